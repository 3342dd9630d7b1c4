"""The room that `near.py` gives figures holds for any margins within the bound, and is no wider than it must be."""

import numpy as np
import pytest
from scipy.special import logit

from pal_ds.eval.metrics import NUM_CALIBRATION_BINS, LabelledPairs, evaluation_figures
from tests.near import room

BOUND = 1e-4
EDGES = logit(0.5 + 0.5 * np.arange(1, NUM_CALIBRATION_BINS) / NUM_CALIBRATION_BINS)


def figures(margins: np.ndarray, labels: np.ndarray, temperature: float) -> dict:
    names = np.asarray(["u"] * len(margins))
    rows = np.arange(len(margins))
    pairs = LabelledPairs(labels, names, rows)
    return evaluation_figures(margins, pairs, temperature=temperature)


@pytest.mark.parametrize("place", ["anywhere", "at edges of bins", "at ties"])
def test_figures_of_margins_that_rounding_moves_stay_in_the_room(place: str) -> None:
    draw = np.random.default_rng(0)
    for num_pairs in (1, 2, 9, 50) * 20:
        labels = draw.choice([-1.0, 1.0], num_pairs)
        size = {
            "anywhere": 2 * draw.normal(size=num_pairs),
            "at edges of bins": draw.choice(EDGES, num_pairs),
            "at ties": np.zeros(num_pairs),
        }[place]
        first, second = (size + draw.uniform(-BOUND / 2, BOUND / 2, num_pairs) for _ in range(2))
        temperatures = 1.0, 1.0 + draw.uniform(-BOUND, BOUND)
        one, other = (
            figures(margins, labels, temperature)
            for margins, temperature in zip((first, second), temperatures, strict=True)
        )
        for key, most in room(first, BOUND, temperatures)._asdict().items():
            assert abs(one[key] - other[key]) <= most, key


def test_the_room_is_that_of_rounding_where_nothing_jumps() -> None:
    """Nine margins as of a small run: a figure that is off by more than what moved it is seen."""
    margins = np.array([0.206, 0.173, 0.245, 0.285, 0.192, 0.195, 0.321, 0.294, 0.207])
    assert np.abs(np.abs(margins)[:, None] - EDGES).min() > BOUND
    found = room(margins, BOUND, (1.0, 1.0))
    assert found.accuracy < 1e-9
    assert found.ece <= BOUND / 2 + 1e-9 and found.brier <= BOUND + 1e-9


def test_a_jump_costs_the_pair_that_jumps() -> None:
    """One of four at an edge: half of a pair's gap each way; one of four at a tie: a pair's accuracy."""
    others = [3.0, -3.0, 3.0]
    assert room(np.array([EDGES[0], *others]), BOUND, (1.0, 1.0)).ece == pytest.approx(
        0.5, abs=1e-4
    )
    assert room(np.array([0.0, *others]), BOUND, (1.0, 1.0)).accuracy == pytest.approx(0.25)
