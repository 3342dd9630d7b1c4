"""From margins of scored pairs to the figures of an evaluation; numpy in fp64, fixed order, no model in sight."""

from typing import NamedTuple, cast

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from pal_ds.data.tables import preferences
from pal_ds.eval.schema import (
    CalibrationFigures,
    MeanFigures,
    PairFigures,
    ReliabilityBin,
    UserFigures,
)

NUM_CALIBRATION_BINS = 15
FIGURES = (
    "accuracy",
    "accuracy_ci95",
    "user_accuracy_mean",
    "worst_decile_user_accuracy",
    "ece",
    "brier",
    "reliability",
    "temperature",
    "controversial",
    "length_baseline_accuracy",
    "format_baseline_accuracy",
    "bayes_accuracy",
    "probability_mae",
)
"""Keys of `evaluation_figures` beside "pairs" and "users"; all of them null for an empty set."""


def correctness(margins: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where the preferred response scores higher, 0 where lower or no number, 1/2 for a tie; fp64 [n].

    >>> correctness(np.array([2.0, 2.0, 0.0, np.nan]), np.array([1, -1, 1, 1])).tolist()
    [1.0, 0.0, 0.5, 0.0]
    """
    signed = margins * labels
    return (signed > 0) + 0.5 * (signed == 0)


MIN_CLUSTERS = 10
"""Fewest clusters (prompts, or users) whose spread says how far a mean may be off."""


def clustered_standard_error(values: np.ndarray, clusters: np.ndarray) -> float:
    """Standard error of the mean when values share clusters (all pairs of a prompt stand or fall together).

    Cluster-robust variance of a mean: sum over clusters of (sum of residuals)^2 / n^2, with C / (C - 1).
    """
    index = np.unique(clusters, return_inverse=True)[1]
    residuals = np.bincount(index, weights=values - values.mean())
    num_clusters = len(residuals)
    correction = num_clusters / (num_clusters - 1) if num_clusters > 1 else 1.0
    return float(np.sqrt(correction * (residuals**2).sum()) / len(values))


def clustered_interval(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """95% interval of a mean of values in [0, 1] that share clusters; see `interval_of_share`."""
    error = clustered_standard_error(values, clusters)
    return interval_of_share(float(values.mean()), error, len(np.unique(clusters)))


def interval_of_share(mean: float, standard_error: float, num_clusters: int) -> tuple[float, float]:
    """95% interval of a mean in [0, 1]: normal, and at least Wilson's where clusters are few or all alike.

    Wilson (1927) with one trial a cluster: three pairs that are all right say little, not that nothing can be wrong.

    >>> [round(end, 2) for end in interval_of_share(1.0, 0.0, num_clusters=3)]
    [0.44, 1.0]
    >>> [round(end, 2) for end in interval_of_share(0.7, 0.05, num_clusters=80)]
    [0.6, 0.8]
    """
    z, n = 1.96, num_clusters
    low, high = mean - z * standard_error, mean + z * standard_error
    if n < MIN_CLUSTERS or standard_error == 0:
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * np.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        low, high = min(low, centre - half), max(high, centre + half)
    return float(max(0.0, low)), float(min(1.0, high))


def fit_temperature(margins: np.ndarray, labels: np.ndarray) -> float:
    """T > 0 that makes margin / T the best log-odds on held-out pairs: hinge margins are no log-odds by themselves.

    Margins that are no numbers say nothing; 1 where all are such.
    """
    signed = (margins * labels)[np.isfinite(margins)]
    if len(signed) == 0:
        return 1.0
    best = minimize_scalar(
        lambda t: -log_expit(signed * np.exp(-t)).mean(), bounds=(-7.0, 7.0), method="bounded"
    )
    return float(np.exp(best.x))


class Calibration(NamedTuple):
    """Distance of stated confidence from the truth, over all of some pairs."""

    ece: float
    """Mean gap between confidence and accuracy over equal bins of confidence in [1/2, 1] (Naeini et al. 2015)."""
    brier: float
    """Mean of (sigmoid(margin) - 1[response_2 is preferred])^2, in [0, 1]; 1/4 for a coin (Brier 1950)."""


def calibrations(
    margins: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> list[Calibration | None]:
    """Compute calibration by group 0, 1, ... from log-odds [n], labels -1 or +1 [n] and the group of each pair [n].

    None where a margin is no number: a diverged model states no confidence. The ECE of few pairs is biased upwards
    (one pair alone has the gap of a bin of its own); the Brier score is not.
    """
    confidence, right = expit(np.abs(margins)), correctness(margins, labels)
    # Only bins that hold a pair: users times bins would be many.
    cells, cell = np.unique(
        groups * NUM_CALIBRATION_BINS + _confidence_bin(confidence), return_inverse=True
    )
    gaps = np.abs(np.bincount(cell, weights=right - confidence, minlength=len(cells)))
    counts = np.bincount(groups)
    ece = np.bincount(cells // NUM_CALIBRATION_BINS, weights=gaps, minlength=len(counts)) / counts
    squares = expit(-margins * labels) ** 2
    brier = np.bincount(groups, weights=squares, minlength=len(counts)) / counts
    return [
        None if np.isnan(pair).any() else Calibration(*pair)
        for pair in zip(ece.tolist(), brier.tolist(), strict=True)
    ]


def reliability(margins: np.ndarray, labels: np.ndarray) -> list[ReliabilityBin] | None:
    """The reliability diagram: {"confidence", "accuracy", "pairs"} of each bin that holds pairs, least sure first.

    None where a margin is no number.
    """
    if np.isnan(margins).any():
        return None
    confidence, right = expit(np.abs(margins)), correctness(margins, labels)
    index = np.unique(_confidence_bin(confidence), return_inverse=True)[1]
    counts = np.bincount(index)
    means = (np.bincount(index, weights=values) / counts for values in (confidence, right))
    return [
        {"confidence": stated, "accuracy": accuracy, "pairs": count}
        for stated, accuracy, count in zip(*map(np.ndarray.tolist, (*means, counts)), strict=True)
    ]


def _confidence_bin(confidence: np.ndarray) -> np.ndarray:
    """Find the equal bin of [1/2, 1] that each confidence falls in; what is no number goes to the last."""
    place = np.nan_to_num((confidence - 0.5) * 2 * NUM_CALIBRATION_BINS, nan=np.inf)
    return np.minimum(place, NUM_CALIBRATION_BINS - 1).astype(int)


def user_figures(
    margins: np.ndarray, labels: np.ndarray, user_ids: np.ndarray, temperature: float
) -> dict[str, UserFigures]:
    """{"user": {"pairs", "accuracy", "ece", "brier"}} in the order of the ids; see `calibrations` for null."""
    names, index, counts = np.unique(user_ids, return_inverse=True, return_counts=True)
    means = np.bincount(index, weights=correctness(margins, labels)) / counts
    return {
        str(name): {"pairs": count, "accuracy": mean, **_named(calibration)}
        for name, count, mean, calibration in zip(
            names,
            counts.tolist(),
            means.tolist(),
            calibrations(margins / temperature, labels, index),
            strict=True,
        )
    }


def _named(calibration: Calibration | None) -> CalibrationFigures:
    if calibration is None:
        return {"ece": None, "brier": None}
    return {"ece": calibration.ece, "brier": calibration.brier}


def mean_figures(right: np.ndarray, prompts: np.ndarray) -> MeanFigures:
    """Compute {"pairs", "accuracy", "accuracy_ci95"} of some of the pairs; the latter two null where there are none.

    >>> figures = mean_figures(np.array([1.0, 1.0, 0.0, 1.0]), np.array([0, 0, 1, 2]))
    >>> figures["pairs"], round(figures["accuracy"], 4)
    (4, 0.75)
    """
    if len(right) == 0:
        return {"pairs": 0, "accuracy": None, "accuracy_ci95": None}
    interval = list(clustered_interval(right, prompts))
    return {"pairs": len(right), "accuracy": float(right.mean()), "accuracy_ci95": interval}


def controversial(table: np.ndarray) -> np.ndarray:
    """Mark comparisons on which users disagree, as their source says or else as these rows show; bool [n].

    `table` is in `COMPARISON_DTYPE`. A pair of responses, in either order, is controversial where two different users
    prefer different ones of them, and then all comparisons of it are; a user at odds with nobody but themselves makes
    none.
    """
    low, high = np.minimum(table["a"], table["b"]), np.maximum(table["a"], table["b"])
    pair = np.unique(low * (high.max(initial=0) + 1) + high, return_inverse=True)[1]
    # A tie takes no side.
    sure, num_pairs = preferences(table) != 0, pair.max(initial=-1) + 1
    prefers_high = sure & ((table["label"] > 0) == (table["b"] == high))
    num_users = len(np.unique(table["user"]))
    user = np.unique(table["user"], return_inverse=True)[1]
    decided = np.unique((pair * num_users + user)[sure]) // max(num_users, 1)
    judges = np.bincount(decided, minlength=num_pairs)
    counts = np.maximum(np.bincount(pair, weights=sure), 1)
    share = np.bincount(pair, weights=prefers_high) / counts
    shown = ((judges > 1) & (share > 0) & (share < 1))[pair]
    said = table["controversial"]
    return np.where(said >= 0, said == 1, shown)


class LabelledPairs(NamedTuple):
    """Facts about n pairs that are scored, apart from their scores."""

    labels: np.ndarray
    """+1 where response_2 is preferred, -1 where response_1 is; fp64 [n]."""
    user_ids: np.ndarray
    """Id of the user of each comparison; str [n]."""
    prompts: np.ndarray
    """Prompt of each, by which intervals are clustered; int64 [n]."""
    probabilities: np.ndarray | None = None
    """Known probability that response_2 is preferred, NaN where unknown; fp64 [n]."""
    controversial: np.ndarray | None = None
    """Pairs on which users disagree; bool [n]."""
    best_accuracy: float | None = None
    """The best that is possible on all of them, where labels were drawn by these probabilities."""


def evaluation_figures(
    margins: np.ndarray,
    pairs: LabelledPairs,
    *,
    temperature: float = 1.0,
    length_margins: np.ndarray | None = None,
    format_margins: np.ndarray | None = None,
) -> PairFigures:
    """Compute the figures of `eval/NAME.json` for one set of pairs; an empty set has every key, null.

    Args:
        margins: reward of response_2 less that of response_1; fp64 [n].
        pairs: labels, users and prompts of the pairs.
        temperature: margins / temperature are log-odds.
        length_margins: how much longer response_2 is, in characters; fp64 [n].
        format_margins: how much likelier response_2 is preferred by its first and last token; fp64 [n].
    """
    labels, user_ids, prompts, probabilities, controversial, best = pairs
    if len(margins) == 0:
        return cast(PairFigures, {"pairs": 0, **dict.fromkeys(FIGURES), "users": {}})
    right = correctness(margins, labels)
    users = user_figures(margins, labels, user_ids, temperature)
    accuracies = np.sort([user["accuracy"] for user in users.values()])
    (calibration,) = calibrations(margins / temperature, labels, np.zeros(len(margins), int))
    disputed = np.zeros(len(margins), bool) if controversial is None else controversial
    known: dict[str, float | None] = {} if best is None else {"bayes_accuracy": best}
    if probabilities is not None and np.isfinite(probabilities).all():
        error = np.abs(expit(margins / temperature) - probabilities).mean()
        known["probability_mae"] = None if np.isnan(error) else float(error)
    figures = {
        **mean_figures(right, prompts),
        "user_accuracy_mean": float(accuracies.mean()),
        "worst_decile_user_accuracy": float(accuracies[: max(1, len(accuracies) // 10)].mean()),
        **_named(calibration),
        "reliability": reliability(margins / temperature, labels),
        "temperature": temperature,
        "controversial": mean_figures(right[disputed], prompts[disputed]),
        "length_baseline_accuracy": _baseline_accuracy(length_margins, labels),
        "format_baseline_accuracy": _baseline_accuracy(format_margins, labels),
        **known,
        "users": users,
    }
    return cast(PairFigures, figures)


def _baseline_accuracy(margins: np.ndarray | None, labels: np.ndarray) -> float | None:
    return None if margins is None else float(correctness(margins, labels).mean())
