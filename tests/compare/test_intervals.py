"""Intervals against numbers worked by hand."""

import numpy as np
import pytest

from pal_ds.compare.intervals import (
    gain_by_prompt,
    gain_over_folds,
    mean_interval,
    summary_of,
    summary_over_folds,
    t_interval,
)
from pal_ds.eval.metrics import clustered_standard_error
from pal_ds.eval.schema import PromptCounts


def test_three_values() -> None:
    """Mean 0.7, s = 0.03, standard error 0.03 / sqrt 3 = 0.0173205, t(0.975, 2) = 4.302653."""
    assert t_interval([0.67, 0.70, 0.73]) == pytest.approx([0.6254759, 0.7745241], abs=1e-7)


def test_five_values() -> None:
    """Deviations -2 -1 0 1 2 hundredths: s = sqrt(10 / 4) / 100, error 0.00707107, t(0.975, 4) = 2.776445."""
    found = t_interval([0.58, 0.59, 0.60, 0.61, 0.62])
    assert found == pytest.approx([0.6 - 0.0196324, 0.6 + 0.0196324], abs=1e-7)


def test_ends_stay_in_the_unit_interval() -> None:
    """Mean 0.8, s = 0.2, half 4.302653 * 0.2 / sqrt 3 = 0.4968; and at 0.2 the other way round."""
    assert t_interval([0.6, 0.8, 1.0]) == pytest.approx([0.3031723, 1.0], abs=1e-6)
    assert t_interval([0.0, 0.2, 0.4]) == pytest.approx([0.0, 0.6968277], abs=1e-6)


def test_two_seeds_have_no_interval() -> None:
    assert t_interval([0.1, 0.9]) is None
    assert summary_of([0.25, 0.75]) == {
        "mean": 0.5,
        "by_seed": [0.25, 0.75],
        "ci95_over_seeds": None,
    }


def test_intervals_of_the_same_pairs_are_averaged() -> None:
    assert mean_interval([[0.1, 0.5], [0.3, 0.6]]) == pytest.approx([0.2, 0.55])


def test_folds_by_hand() -> None:
    """Three folds, two seeds: 0.7 and 0.8 and 0.6 as means over seeds, 0.7 and 0.7 as means over folds."""
    figure = summary_over_folds({"a": [0.6, 0.8], "b": [0.9, 0.7], "c": [0.6, 0.6]})
    assert figure["mean"] == pytest.approx(0.7) and figure["by_seed"] == pytest.approx([0.7, 0.7])
    assert figure["by_fold"] == pytest.approx({"a": 0.7, "b": 0.8, "c": 0.6})
    # s = 0.1, t(0.975, 2) = 4.3027: 4.3027 * 0.1 / sqrt(3).
    assert figure["ci95_over_folds"] == pytest.approx([0.7 - 0.248414, 0.7 + 0.248414], abs=1e-6)
    assert summary_over_folds({"": [0.6, 0.8]}) == summary_of([0.6, 0.8])
    # What all folds have in common is no part of a gain's interval.
    others = {"a": 0.6, "b": 0.72, "c": 0.48}
    gain = gain_over_folds({"a": 0.7, "b": 0.8, "c": 0.6}, others, "other")
    assert gain["mean"] == pytest.approx(0.1) and gain["over"] == "other"
    assert gain["ci95"] == pytest.approx([0.1 - 0.0496828, 0.1 + 0.0496828], abs=1e-6)


def counts_of(right: np.ndarray, prompts: np.ndarray) -> PromptCounts:
    names, index = np.unique(prompts, return_inverse=True)
    sums = np.bincount(index, weights=right)
    return {
        "prompts": names.tolist(),
        "pairs": np.bincount(index).tolist(),
        "right": sums.tolist(),
    }


def test_a_gain_is_paired_by_prompt() -> None:
    """As the clustered error of the difference per pair says, of the mean over two seeds."""
    draw = np.random.default_rng(0)
    prompts = draw.integers(0, 25, 200)
    own, other = (draw.integers(0, 2, (2, 200)).astype(float) for _ in range(2))
    other[:, 100:] = own[:, 100:]
    gain = gain_by_prompt(*([counts_of(r, prompts) for r in side] for side in (own, other)), "x")
    differences = (own - other).mean(0)
    half = 1.96 * clustered_standard_error(differences, prompts)
    assert gain is not None and gain["mean"] == pytest.approx(differences.mean())
    assert gain["ci95"] == pytest.approx([gain["mean"] - half, gain["mean"] + half])
    few = gain_by_prompt([counts_of(own[0], prompts % 5)], [counts_of(other[0], prompts % 5)], "x")
    assert few is not None and few["ci95"] is None, "too few prompts to say"
    assert (
        gain_by_prompt([counts_of(own[0], prompts)], [counts_of(own[0], prompts % 7)], "x") is None
    )
