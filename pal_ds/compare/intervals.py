"""Means over seeds and their 95% intervals; numpy and scipy alone."""

from typing import NotRequired, TypedDict

import numpy as np
from scipy import stats

from pal_ds.eval.metrics import MIN_CLUSTERS
from pal_ds.eval.schema import PromptCounts

MIN_VALUES = 3
"""Fewest seeds for an interval: two say too little of their spread (with one degree of freedom t is 12.7)."""


def t_interval(values: list[float]) -> list[float] | None:
    """Return the 95% interval of the mean of independent values in [0, 1], by Student's t; None for fewer than three.

    mean +- t(0.975, n - 1) * s / sqrt(n), s with n - 1 in the denominator, cut to [0, 1].

    >>> [round(end, 3) for end in t_interval([0.70, 0.72, 0.74]) or []]
    [0.67, 0.77]
    >>> t_interval([0.70, 0.72]) is None
    True
    """
    half = half_width(values)
    if half is None:
        return None
    mean = float(np.mean(values))
    return [max(0.0, mean - half), min(1.0, mean + half)]


def half_width(values: list[float]) -> float | None:
    """Half of the 95% interval of the mean of independent values, by Student's t; None for fewer than three."""
    num_values = len(values)
    if num_values < MIN_VALUES:
        return None
    spread = float(np.std(values, ddof=1)) / np.sqrt(num_values)
    return float(stats.t.ppf(0.975, num_values - 1)) * float(spread)


def mean_interval(intervals: list[list[float]]) -> list[float]:
    """Return the mean lower and the mean upper end: figures on the same pairs have sampling errors that go together."""
    low, high = np.mean(intervals, axis=0)
    return [float(low), float(high)]


class Figure(TypedDict):
    """A figure of a method over its seeds, and over the folds of a suite that has some."""

    mean: float
    by_seed: list[float]
    """Values in the order of the suite's seeds; means over folds."""
    ci95_over_seeds: list[float] | None
    """t-interval of the mean; None for fewer than three seeds."""
    by_fold: NotRequired[dict[str, float]]
    """Means over seeds."""
    ci95_over_folds: NotRequired[list[float] | None]
    """t-interval of the mean over folds, which were drawn from others like them; None for fewer than three."""
    pairs: NotRequired[int]
    """Comparisons that it was measured on, where they are not all."""


class AccuracyFigure(Figure):
    """An accuracy, which a single run has an interval of, too."""

    ci95_within_seed: list[float] | None
    """Mean over runs of the ends of a run's interval; None where runs give none."""


class Gain(TypedDict):
    """Accuracy of a method less that of another on the same pairs."""

    over: str
    """Name of the other."""
    mean: float
    ci95: list[float] | None
    """By fold where the suite has folds, else by prompt, means over seeds; None where there are too few of them."""
    by_fold: NotRequired[dict[str, float]]


def summary_of(values: list[float]) -> Figure:
    """Return mean, values and t-interval of a figure whose values, one a seed, lie in [0, 1]."""
    return {
        "mean": float(np.mean(values)),
        "by_seed": values,
        "ci95_over_seeds": t_interval(values),
    }


def summary_over_folds(values: dict[str, list[float]]) -> Figure:
    """Return the figure of values by fold and seed; the empty name is that of all data of a suite without folds."""
    if [*values] == [""]:
        return summary_of(values[""])
    by_fold = {fold: float(np.mean(of_fold)) for fold, of_fold in values.items()}
    by_seed = np.mean([*values.values()], axis=0).tolist()
    over_folds = t_interval([*by_fold.values()])
    return {**summary_of(by_seed), "by_fold": by_fold, "ci95_over_folds": over_folds}


def gain_over_folds(own: dict[str, float], others: dict[str, float], over: str) -> Gain:
    """Return the mean over folds of a method's gain over another, with the t-interval of the differences.

    >>> gain = gain_over_folds({"a": 0.7, "b": 0.8, "c": 0.9}, {"a": 0.6, "b": 0.7, "c": 0.8}, "x")
    >>> round(gain["mean"], 3), [round(end, 3) for end in gain["ci95"] or []]
    (0.1, [0.1, 0.1])
    """
    gains = {fold: value - others[fold] for fold, value in own.items()}
    mean, half = float(np.mean([*gains.values()])), half_width([*gains.values()])
    interval = None if half is None else [mean - half, mean + half]
    return {"over": over, "mean": mean, "ci95": interval, "by_fold": gains}


def gain_by_prompt(own: list[PromptCounts], others: list[PromptCounts], over: str) -> Gain | None:
    """Return the gain on the pairs of one set, means over the runs of each method, clustered by prompt.

    None where the two were not measured on the same pairs.
    """
    facts = {(str(counts["prompts"]), str(counts["pairs"])) for counts in (*own, *others)}
    if len(facts) != 1:
        return None
    pairs = np.asarray(own[0]["pairs"])
    right, other = (np.mean([counts["right"] for counts in side], axis=0) for side in (own, others))
    gains, num_pairs, num_prompts = right - other, pairs.sum(), len(pairs)
    mean = float(gains.sum() / num_pairs)
    if num_prompts < MIN_CLUSTERS:
        return {"over": over, "mean": mean, "ci95": None}
    residuals = gains - mean * pairs
    correction = num_prompts / (num_prompts - 1)
    half = 1.96 * float(np.sqrt(correction * (residuals**2).sum()) / num_pairs)
    return {"over": over, "mean": mean, "ci95": [mean - half, mean + half]}
