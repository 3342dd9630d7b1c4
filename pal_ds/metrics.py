"""From margins of judged pairs to the figures of an evaluation; numpy in fp64, fixed order, no model in sight."""

from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

NUM_CALIBRATION_BINS = 15
FIGURES = (
    "accuracy",
    "accuracy_ci95",
    "user_accuracy_mean",
    "worst_decile_user_accuracy",
    "ece",
    "temperature",
    "length_baseline_accuracy",
    "bayes_accuracy",
    "probability_mae",
)
"""What `evaluation_figures` may say beside "pairs" and "users"; all of it null for an empty set."""


def correctness(margins: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where the preferred response scores higher, 0 where lower or no number, 1/2 for a tie; fp64 [n]."""
    signed = margins * labels
    return (signed > 0) + 0.5 * (signed == 0)


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
    """95% interval (normal approximation) of a mean of values in [0, 1] that share clusters."""
    mean, half = values.mean(), 1.96 * clustered_standard_error(values, clusters)
    return float(max(0.0, mean - half)), float(min(1.0, mean + half))


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


def expected_calibration_error(margins: np.ndarray, labels: np.ndarray) -> float | None:
    """Mean gap between stated confidence and accuracy over equal bins of confidence in [1/2, 1].

    None where a margin is no number: a diverged model states no confidence.
    """
    if np.isnan(margins).any():
        return None
    confidence = expit(np.abs(margins))
    right = correctness(margins, labels)
    bins = np.minimum(
        ((confidence - 0.5) * 2 * NUM_CALIBRATION_BINS).astype(int), NUM_CALIBRATION_BINS - 1
    )
    gaps = np.bincount(bins, weights=right - confidence, minlength=NUM_CALIBRATION_BINS)
    return float(np.abs(gaps).sum() / len(margins))


def user_accuracies(right: np.ndarray, user_ids: np.ndarray) -> dict[str, dict[str, Any]]:
    """{"user": {"pairs", "accuracy"}} in the order of the ids."""
    names, index, counts = np.unique(user_ids, return_inverse=True, return_counts=True)
    means = np.bincount(index, weights=right) / counts
    return {
        str(name): {"pairs": int(count), "accuracy": float(mean)}
        for name, count, mean in zip(names, counts, means, strict=True)
    }


def evaluation_figures(
    margins: np.ndarray,
    labels: np.ndarray,
    user_ids: np.ndarray,
    prompts: np.ndarray,
    *,
    temperature: float = 1.0,
    length_margins: np.ndarray | None = None,
    probabilities: np.ndarray | None = None,
) -> dict[str, Any]:
    """The figures of `eval/NAME.json` for one set of pairs.

    `margins` > 0 prefer response_2; `length_margins` = how much longer response_2 is; `probabilities` = known truth
    that response_2 is preferred, NaN where unknown: the figures that need it are then left out. An empty set has every
    key, null.
    """
    if len(margins) == 0:
        return {"pairs": 0, **dict.fromkeys(FIGURES), "users": {}}
    right = correctness(margins, labels)
    users = user_accuracies(right, user_ids)
    accuracies = np.sort([user["accuracy"] for user in users.values()])
    figures: dict[str, Any] = {
        "pairs": len(margins),
        "accuracy": float(right.mean()),
        "accuracy_ci95": list(clustered_interval(right, prompts)),
        "user_accuracy_mean": float(accuracies.mean()),
        "worst_decile_user_accuracy": float(accuracies[: max(1, len(accuracies) // 10)].mean()),
        "ece": expected_calibration_error(margins / temperature, labels),
        "temperature": temperature,
        "length_baseline_accuracy": None,
    }
    if length_margins is not None:
        figures["length_baseline_accuracy"] = float(correctness(length_margins, labels).mean())
    if probabilities is not None and np.isfinite(probabilities).all():
        figures["bayes_accuracy"] = float(np.maximum(probabilities, 1 - probabilities).mean())
        error = np.abs(expit(margins / temperature) - probabilities).mean()
        figures["probability_mae"] = None if np.isnan(error) else float(error)
    return {**figures, "users": users}
