"""Means over seeds and their 95% intervals; numpy and scipy alone."""

from typing import NotRequired, TypedDict

import numpy as np
from scipy import stats

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
    num_values = len(values)
    if num_values < MIN_VALUES:
        return None
    spread = float(np.std(values, ddof=1)) / np.sqrt(num_values)
    half = float(stats.t.ppf(0.975, num_values - 1)) * float(spread)
    mean = float(np.mean(values))
    return [max(0.0, mean - half), min(1.0, mean + half)]


def mean_interval(intervals: list[list[float]]) -> list[float]:
    """Return the mean lower and the mean upper end: figures on the same pairs have sampling errors that go together."""
    low, high = np.mean(intervals, axis=0)
    return [float(low), float(high)]


class Figure(TypedDict):
    """A figure of a method over its seeds."""

    mean: float
    by_seed: list[float]
    """Values in the order of the suite's seeds."""
    ci95_over_seeds: list[float] | None
    """t-interval of the mean; None for fewer than three seeds."""
    pairs: NotRequired[int]
    """Comparisons that it was measured on, where they are not all."""


class AccuracyFigure(Figure):
    """An accuracy, which a single run has an interval of, too."""

    ci95_within_seed: list[float] | None
    """Mean over seeds of the ends of a run's interval; None where runs give none."""


def summary_of(values: list[float]) -> Figure:
    """Return mean, values and t-interval of a figure whose values, one a seed, lie in [0, 1]."""
    return {
        "mean": float(np.mean(values)),
        "by_seed": values,
        "ci95_over_seeds": t_interval(values),
    }
