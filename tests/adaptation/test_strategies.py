"""What an answer would tell: closed forms against quadrature, updates against inverses, duels against counting."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pal_ds.adaptation.strategies import (
    GAINS,
    Prompts,
    choose_at_random,
    choose_by_gain,
    choose_duels,
    information,
    log_volume_gain,
    mutual_information,
)

MARGINS = torch.tensor([0.0, 0.5, -1.0, 2.0, -4.0])
VARIANCES = torch.tensor([0.01, 0.1, 1.0, 4.0])


def quadrature(margin: float, variance: float) -> tuple[float, float]:
    """(mutual information of the answer and the margin in nats, E[p (1 - p)]), by 60 nodes, fp64."""
    nodes, weight = np.polynomial.hermite_e.hermegauss(60)
    weight = weight / weight.sum()
    p = 1 / (1 + np.exp(-(margin + math.sqrt(variance) * nodes)))

    def entropy(p: np.ndarray) -> np.ndarray:
        p = np.clip(p, 1e-12, 1 - 1e-12)
        return -(p * np.log(p) + (1 - p) * np.log(1 - p))

    mean = np.array((weight * p).sum())
    return float(entropy(mean) - (weight * entropy(p)).sum()), float((weight * p * (1 - p)).sum())


def test_gains_are_those_of_quadrature() -> None:
    for variance in VARIANCES:
        exact = [quadrature(float(margin), float(variance)) for margin in MARGINS]
        told, mean = (torch.tensor(part).float() for part in zip(*exact, strict=True))
        spread = variance.expand_as(MARGINS)
        torch.testing.assert_close(information(MARGINS, spread), mean, atol=3e-3, rtol=0.08)
        torch.testing.assert_close(mutual_information(MARGINS, spread), told, atol=2e-3, rtol=0.3)
        torch.testing.assert_close(
            log_volume_gain(MARGINS, spread),
            0.5 * torch.log1p(mean * variance),
            atol=3e-3,
            rtol=0.08,
        )
    assert (mutual_information(MARGINS, torch.zeros(5)) == 0).all()


def problem(num_users: int = 3, num_axes: int = 4, count: int = 30) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    slopes = torch.randn(num_users, num_axes, count, generator=draw)
    return torch.randn(num_users, count, generator=draw), slopes


@pytest.mark.parametrize("name", GAINS)
def test_each_choice_is_the_best_once_the_others_are_answered(name: str) -> None:
    margin, slopes = problem()
    everything = torch.ones(3, 30, dtype=torch.bool)
    choice = choose_by_gain(margin, slopes, 5, GAINS[name], everything)
    for user in range(3):
        precision = torch.eye(4, dtype=torch.float64)
        left = set(range(30))
        for place, gain in zip(choice.candidate[user].tolist(), choice.gain[user], strict=True):
            covariance = torch.linalg.inv(precision)
            own = slopes[user].double()
            variance = torch.einsum("dc,de,ec->c", own, covariance, own)
            gains = GAINS[name](margin[user].double(), variance)
            best = max(left, key=lambda c: float(gains[c]))
            assert gains[place] >= gains[best] - 1e-5
            torch.testing.assert_close(gain.double(), gains[place], atol=1e-5, rtol=1e-4)
            left.remove(place)
            told = information(margin[user].double(), variance)[place]
            precision = precision + told * torch.outer(own[:, place], own[:, place])


def test_a_batch_does_not_ask_the_same_thing_twice() -> None:
    """The two most telling candidates are one question in other words: one of them is asked."""
    slopes = torch.tensor([[[3.0, 3.0, 0.0], [0.0, 0.0, 2.5]]])
    free = torch.ones(1, 3, dtype=torch.bool)
    for gain_of in GAINS.values():
        choice = choose_by_gain(torch.zeros(1, 3), slopes, 2, gain_of, free)
        assert choice.candidate.tolist() == [[0, 2]]
    free[0, 0] = False
    choice = choose_by_gain(torch.zeros(1, 3), slopes, 2, log_volume_gain, free)
    assert choice.candidate.tolist() == [[1, 2]]


def test_any_order_is_as_likely() -> None:
    noise = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    free = torch.tensor([True, True, False]).expand(4000, -1)
    first = choose_at_random(noise, 2, free).candidate[:, 0]
    assert set(first.tolist()) == {0, 1} and abs(float((first == 0).float().mean()) - 0.5) < 0.03


def test_shares_of_the_best_are_counted() -> None:
    prompt = torch.tensor([1, 0, 1, 1, 0])
    rewards = torch.randn(2, 50, 5, generator=torch.Generator().manual_seed(0))
    shares = Prompts.of(prompt).shares_of_best(rewards)
    for user in range(2):
        for members in ([1, 4], [0, 2, 3]):
            best = rewards[user][:, members].argmax(1)
            expected = torch.bincount(best, minlength=len(members)) / 50
            torch.testing.assert_close(shares[user][members], expected)


def test_duels_are_drawn_by_their_chance() -> None:
    shares = torch.tensor([0.5, 0.4, 0.1, 1.0, 0.0]).expand(4000, -1)
    sides = torch.tensor([[0, 1], [0, 2], [3, 4]])
    noise = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0))
    free = torch.ones(4000, 3, dtype=torch.bool)
    choice = choose_duels(shares, sides, noise, 3, free)
    # 0.4 against 0.1, and what no draw calls a duel comes last.
    assert abs(float((choice.candidate[:, 0] == 0).float().mean()) - 0.8) < 0.03
    assert (choice.candidate[:, 2] == 2).float().mean() > 0.99
    torch.testing.assert_close(choice.gain[0].sort().values, torch.tensor([0.0, 0.1, 0.4]))
