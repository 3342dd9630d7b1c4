"""How far figures of an evaluation may lie apart when the margins they are made from agree to rounding only.

What is bitwise, and on what: one run, one world size, one split into forwards, one number of threads, one machine.
Between world sizes, paddings and splits a reward is the same sum of floats in another order, and which order that is
depends on the processor's vector width. So margins agree to a bound, figures that are smooth in them to a bound that
follows, and figures that jump (counts, bins, orders) agree unless a margin lies within the bound of where they jump.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import expit

from pal_ds.eval.metrics import NUM_CALIBRATION_BINS

FP32_STEP = 2.0**-23
"""Of neighbouring fp32 numbers, as a share of their size, at most."""
ROUNDINGS = 8
"""What other orders of sums make of a reward, in FP32_STEPs of the largest reward.

A reward of these small models goes through some 40 roundings (two layers of norm, attention and MLP, then the head).
Independent, of half a step each, they add up to about 3 steps; a margin is the difference of two rewards, and two
runs are compared, so 6.
"""


def margin_bound(rewards: np.ndarray) -> float:
    """How far a margin may lie from the same margin of another world size, padding or split, given the rewards."""
    return ROUNDINGS * FP32_STEP * float(np.abs(rewards).max())


class Room(NamedTuple):
    """How far figures of some pairs may lie apart."""

    accuracy: float
    ece: float
    brier: float


def room(margins: np.ndarray, bound: float, temperatures: tuple[float, float]) -> Room:
    """Of two evaluations of pairs whose margins [n] differ by at most `bound`, made at these temperatures.

    A pair within the bound of a tie may be right in one and not in the other: 1 / n of the accuracy.
    Its confidence c = sigmoid(|margin| / T) lies in an interval, whose width w it can move by. ECE is the sum over bins
    of |sum of (right - c)| / n: a pair that stays in its bin moves it by at most w / n, one that changes sides by
    1 / n more, and one whose interval holds an edge between bins may take its whole |right - c| <= 1 from one bin's
    gap to another's, 2 / n. A Brier term is the square of a number in [0, 1] that moves by w: by at most 2 w.
    """
    size = np.abs(margins)
    low = expit(np.maximum(size - bound, 0.0) / max(temperatures))
    high = expit((size + bound) / min(temperatures))
    width, turns = high - np.where(size <= bound, 1 - high, low), size <= bound
    bins = [np.floor((c - 0.5) * 2 * NUM_CALIBRATION_BINS) for c in (low, high)]
    crosses = np.minimum(bins[0], NUM_CALIBRATION_BINS - 1) != np.minimum(
        bins[1], NUM_CALIBRATION_BINS - 1
    )
    rounding = 1e-12  # of the figures themselves, in fp64
    return Room(
        accuracy=float(turns.mean()) + rounding,
        ece=float((width + turns + 2.0 * crosses).mean()) + rounding,
        brier=float(2 * width.mean()) + rounding,
    )
