"""Intervals against numbers worked by hand."""

import pytest

from pal_ds.compare.intervals import mean_interval, summary_of, t_interval


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
