"""Figures of an evaluation against counts made by hand and against simulation."""

import numpy as np
import pytest
from scipy.special import expit

from pal_ds.metrics import (
    clustered_interval,
    correctness,
    evaluation_figures,
    expected_calibration_error,
    fit_temperature,
)


def test_ties_count_half() -> None:
    margins, labels = np.array([1.0, -1.0, 0.0, 2.0]), np.array([1, 1, 1, -1])
    assert list(correctness(margins, labels)) == [1.0, 0.0, 0.5, 0.0]


def test_margins_that_are_no_numbers_are_wrong_and_state_no_confidence() -> None:
    margins = np.array([np.nan, 1.0, np.inf, -np.inf])
    labels, ones = np.array([1.0, 1.0, 1.0, 1.0]), np.zeros(4)
    figures = evaluation_figures(
        margins, labels, np.array(["a"] * 4), ones, probabilities=np.full(4, 0.7)
    )
    assert figures["accuracy"] == 0.5
    assert figures["ece"] is None
    assert figures["probability_mae"] is None
    assert fit_temperature(np.full(4, np.nan), labels) == 1.0
    assert fit_temperature(np.array([np.nan, 1.0]), labels[:2]) == pytest.approx(
        fit_temperature(np.array([1.0]), labels[:1])
    )


def test_figures_by_hand() -> None:
    figures = evaluation_figures(
        np.array([2.0, -1.0, 0.5, 0.0]),
        np.array([1, 1, -1, 1]),
        np.array(["a", "a", "b", "b"]),
        np.array([0, 1, 2, 3]),
        length_margins=np.array([3.0, 1.0, 1.0, 1.0]),
        probabilities=np.array([0.9, 0.5, 0.2, 0.7]),
    )
    assert figures["accuracy"] == pytest.approx(1.5 / 4)
    assert figures["users"] == {
        "a": {"pairs": 2, "accuracy": 0.5},
        "b": {"pairs": 2, "accuracy": 0.25},
    }
    assert figures["user_accuracy_mean"] == pytest.approx(0.375)
    assert figures["worst_decile_user_accuracy"] == pytest.approx(0.25)
    assert figures["length_baseline_accuracy"] == pytest.approx(0.75)
    assert figures["bayes_accuracy"] == pytest.approx((0.9 + 0.5 + 0.8 + 0.7) / 4)


def test_empty_set() -> None:
    empty = np.empty(0)
    figures = evaluation_figures(empty, empty, empty, empty)
    full = evaluation_figures(
        np.ones(2), np.ones(2), np.array(["a", "b"]), np.arange(2), probabilities=np.ones(2)
    )
    assert list(figures) == list(full)
    assert figures == {**dict.fromkeys(full), "pairs": 0, "users": {}}


def test_interval_grows_with_clusters() -> None:
    generator = np.random.default_rng(0)
    values = (generator.random(400) < 0.7).astype(float)
    low, high = clustered_interval(values, np.arange(400))
    half = 1.96 * values.std(ddof=1) / 20
    assert (high - low) / 2 == pytest.approx(half, rel=1e-6)
    # Ten copies of forty values hold the information of forty.
    copied = np.repeat(values[:40], 10)
    low, high = clustered_interval(copied, np.repeat(np.arange(40), 10))
    assert (high - low) / 2 == pytest.approx(1.96 * values[:40].std(ddof=1) / np.sqrt(40), rel=1e-6)


def test_temperature_and_calibration() -> None:
    generator = np.random.default_rng(1)
    truth = generator.normal(0, 2, 40000)
    labels = np.where(generator.random(40000) < expit(truth), 1, -1)
    stated = 5 * truth
    temperature = fit_temperature(stated, labels)
    assert temperature == pytest.approx(5.0, rel=0.05)
    assert expected_calibration_error(stated / temperature, labels) < 0.01
    assert expected_calibration_error(stated, labels) > 0.05
