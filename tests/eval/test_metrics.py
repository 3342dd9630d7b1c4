"""Figures of an evaluation against counts made by hand and against simulation."""

import numpy as np
import pytest
import scipy.stats
from scipy.special import expit

from pal_ds.eval.metrics import (
    LabelledPairs,
    calibrations,
    clustered_interval,
    correctness,
    evaluation_figures,
    fit_temperature,
    reliability,
)


def test_ties_count_half() -> None:
    margins, labels = np.array([1.0, -1.0, 0.0, 2.0]), np.array([1, 1, 1, -1])
    assert list(correctness(margins, labels)) == [1.0, 0.0, 0.5, 0.0]


def test_margins_that_are_no_numbers_are_wrong_and_state_no_confidence() -> None:
    margins = np.array([np.nan, 1.0, np.inf, -np.inf])
    labels, ones = np.array([1.0, 1.0, 1.0, 1.0]), np.zeros(4)
    figures = evaluation_figures(
        margins, LabelledPairs(labels, np.array(["a"] * 4), ones, np.full(4, 0.7))
    )
    assert figures["accuracy"] == 0.5
    assert figures["ece"] is None and figures["brier"] is None and figures["reliability"] is None
    assert figures["probability_mae"] is None
    assert fit_temperature(np.full(4, np.nan), labels) == 1.0
    assert fit_temperature(np.array([np.nan, 1.0]), labels[:2]) == pytest.approx(
        fit_temperature(np.array([1.0]), labels[:1])
    )


def test_figures_by_hand() -> None:
    figures = evaluation_figures(
        np.array([2.0, -1.0, 0.5, 0.0]),
        LabelledPairs(
            labels=np.array([1, 1, -1, 1]),
            user_ids=np.array(["a", "a", "b", "b"]),
            prompts=np.array([0, 1, 2, 3]),
            probabilities=np.array([0.9, 0.5, 0.2, 0.7]),
            controversial=np.array([True, True, False, True]),
            best_accuracy=0.725,
        ),
        length_margins=np.array([3.0, 1.0, 1.0, 1.0]),
        format_margins=np.array([3.0, -1.0, 0.0, 0.0]),
    )
    assert figures["accuracy"] == pytest.approx(1.5 / 4)
    users = figures["users"]
    assert {user: (f["pairs"], f["accuracy"]) for user, f in users.items()} == {
        "a": (2, 0.5),
        "b": (2, 0.25),
    }
    assert figures["format_baseline_accuracy"] == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    # Three of the pairs: right, wrong and a tie, each of another prompt.
    disputed = figures["controversial"]
    assert (disputed["pairs"], disputed["accuracy"]) == (3, 0.5)
    half = 1.96 * np.std([1, 0, 0.5], ddof=1) / np.sqrt(3)
    assert disputed["accuracy_ci95"] == pytest.approx([max(0, 0.5 - half), min(1, 0.5 + half)])
    assert figures["user_accuracy_mean"] == pytest.approx(0.375)
    assert figures["worst_decile_user_accuracy"] == pytest.approx(0.25)
    assert figures["length_baseline_accuracy"] == pytest.approx(0.75)
    assert figures["bayes_accuracy"] == 0.725


def test_empty_set() -> None:
    empty = np.empty(0)
    figures = evaluation_figures(empty, LabelledPairs(empty, empty, empty))
    full = evaluation_figures(
        np.ones(2),
        LabelledPairs(
            np.ones(2), np.array(["a", "b"]), np.arange(2), np.ones(2), best_accuracy=1.0
        ),
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


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_clusters", [1, 3, 9])
def test_few_clusters_leave_room(share: float, num_clusters: int) -> None:
    """However alike a handful of pairs are, the interval is Wilson's of as many trials."""
    values = np.full(2 * num_clusters, share)
    low, high = clustered_interval(values, np.arange(2 * num_clusters) // 2)
    expected = scipy.stats.binomtest(round(share * num_clusters), num_clusters).proportion_ci(
        method="wilson"
    )
    assert 0 <= low <= share <= high <= 1 and high - low > 0.2
    if share in (0, 1):
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_many_clusters_that_are_all_right() -> None:
    low, high = clustered_interval(np.ones(100), np.arange(100))
    assert high == pytest.approx(1.0) and 0.95 < low < 0.98


def test_calibration_by_hand() -> None:
    """Two users; confidences 0.9, 0.9, 0.6 and 0.5, in the bins 12, 12, 3 and 0 of fifteen."""
    log_odds = np.log([9.0, 9.0, 1.5, 1.0])
    margins, labels = log_odds * [1, -1, 1, 1], np.array([1, 1, -1, 1])
    first, second = calibrations(margins, labels, np.array([0, 0, 1, 1]))
    # User 0: one bin, accuracy 1/2 at confidence 0.9. User 1: gaps 0 - 0.6, and 1/2 - 1/2 of the tie.
    assert first is not None and second is not None
    assert first == pytest.approx((0.4, (0.1**2 + 0.9**2) / 2), abs=1e-12)
    assert second == pytest.approx((0.3, (0.6**2 + 0.5**2) / 2), abs=1e-12)
    (pooled,) = calibrations(margins, labels, np.zeros(4, int))
    assert pooled == pytest.approx((1.4 / 4, (0.01 + 0.81 + 0.36 + 0.25) / 4), abs=1e-12)
    bins = reliability(margins, labels)
    assert bins is not None
    assert [tuple(row.values()) for row in bins] == [
        pytest.approx(row) for row in [(0.5, 0.5, 1), (0.6, 0.0, 1), (0.9, 0.5, 2)]
    ]


def test_a_user_with_margins_that_are_no_numbers_has_no_calibration_and_others_keep_theirs() -> (
    None
):
    margins, labels = np.array([np.nan, 2.0, 1.0]), np.ones(3)
    figures = evaluation_figures(
        margins, LabelledPairs(labels, np.array(["a", "a", "b"]), np.arange(3))
    )
    assert figures["users"]["a"]["ece"] is None and figures["users"]["a"]["brier"] is None
    alone = evaluation_figures(
        margins[2:], LabelledPairs(labels[2:], np.array(["b"]), np.arange(1))
    )
    assert figures["users"]["b"] == alone["users"]["b"]
    assert alone["users"]["b"]["brier"] == pytest.approx(expit(-1.0) ** 2)


def test_users_are_calibrated_under_the_temperature() -> None:
    margins, labels, users = np.array([4.0, -2.0]), np.ones(2), np.array(["a", "b"])
    figures = evaluation_figures(
        margins, LabelledPairs(labels, users, np.arange(2)), temperature=2.0
    )
    squares = expit(-margins / 2) ** 2
    assert [user["brier"] for user in figures["users"].values()] == pytest.approx(squares)
    assert figures["brier"] == pytest.approx(squares.mean())


def test_temperature_and_calibration() -> None:
    generator = np.random.default_rng(1)
    truth = generator.normal(0, 2, 40000)
    labels = np.where(generator.random(40000) < expit(truth), 1, -1)
    stated = 5 * truth
    temperature = fit_temperature(stated, labels)
    assert temperature == pytest.approx(5.0, rel=0.05)
    everyone = np.zeros(len(labels), int)
    (good,), (bad,) = (calibrations(m, labels, everyone) for m in (stated / temperature, stated))
    assert good is not None and bad is not None
    assert good.ece < 0.01 and bad.ece > 0.05
    # The Brier score is proper: the truth has the best one, which is E[p (1 - p)].
    assert good.brier == pytest.approx((expit(truth) * expit(-truth)).mean(), abs=0.005)
    assert good.brier < bad.brier
