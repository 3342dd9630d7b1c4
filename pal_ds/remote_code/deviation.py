"""The standard deviation of a reward, from the covariance of the user's point; carried by exported folders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

REACH = 3**0.5
"""Standard deviations from the point at which slopes are taken: the outer nodes of Gauss and Hermite's three."""


@dataclass
class RewardOutput(SequenceClassifierOutput):
    """`logits` are rewards [B, 1]; `std` [B, 1] is how sure they are of this user, in the same units."""

    std: Tensor | None = None


def standard_deviation(
    reward: Callable[[Tensor], Tensor],
    point: Sequence[float] | None,
    posterior: Mapping[str, Any] | None,
) -> Tensor:
    """How far rewards move along each axis of the covariance, root of the sum of squares; shaped as `reward` gives.

    Exact where a reward is linear in the point. Raises ValueError where `posterior` is none, or another user's.
    """
    if posterior is None or point is None or list(posterior["mixture"]) != list(point):
        raise ValueError(
            "return_std: nothing is known of how sure this user's point is. Export a user whom `pal-ds adapt` fitted "
            "(consolidate --users U --user ID), or set config.posterior to that user's mixture and covariance."
        )
    covariance = posterior["covariance"]
    own = torch.tensor(point, dtype=torch.float32)
    values, vectors = torch.linalg.eigh(torch.tensor(covariance, dtype=torch.float64))
    axes = (vectors * values.clamp(min=0).sqrt()).T.float()
    variance = torch.zeros_like(reward(own))
    for axis in axes:
        up, down = (reward(own + reach * axis) for reach in (REACH, -REACH))
        variance += ((up - down) / (2 * REACH)).square()
    return variance.sqrt()
