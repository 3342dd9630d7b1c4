"""The kernels' definitions in plain torch: what every fast version is held against, and what runs without one.

Arithmetic is in fp32, or in fp64 where an input is fp64; autograd makes the gradients. Axes: B comparisons, R
distinct responses, T positions, d reward space, K prototypes, U users, N items, Q sets of prototypes.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pal_ds.losses import PairFacts, TokenWeighting, hinge, logistic, smooth_hinge, token_weights

_LOSSES = {"logistic": logistic, "hinge": hinge, "smooth_hinge": smooth_hinge}


class PairLossOutput(NamedTuple):
    """Result of the pair loss. Only `total` carries gradients."""

    total: Float[Tensor, ""]
    """sum over comparisons of weight * loss."""
    loss: Float[Tensor, "B"]
    reward: Float[Tensor, "B 2 T"]
    """Rewards, and margin below, are 0 where the token weighting is."""
    margin: Float[Tensor, "B T"]


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where a tensor is, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def pair_loss(
    response: Float[Tensor, "R T d"],
    response_index: Int[Tensor, "B 2"],
    point: Float[Tensor, "B g d"],
    scale: Float[Tensor, "1"] | None,
    facts: PairFacts,
    kind: str,
    weighting: TokenWeighting,
) -> PairLossOutput:
    """Loss of comparisons by distance (scale unset) or scaled cosine; see `kernels.pair_loss`."""
    dtype = working_dtype(response, point)
    weight = token_weights(weighting, facts.start, facts.end, response.shape[1], dtype)
    counts = weight > 0
    # Masked before anything is computed: what lies outside may be NaN, and 0 * NaN is NaN.
    z = torch.nn.functional.embedding(response_index, response.flatten(1)).to(dtype)
    z = z.unflatten(-1, response.shape[1:]).masked_fill(~counts[:, None, :, None], 0.0)
    a = point.to(dtype)[:, :, None, :]
    if scale is None:
        reward = -torch.linalg.vector_norm(z - a, dim=-1)
    else:
        reward = scale.to(dtype) * (unit(z) * unit(a)).sum(-1)
    reward = reward.masked_fill(~counts[:, None, :], 0.0)
    margin = reward[:, 1] - reward[:, 0]
    signed = facts.label[:, None] * margin - facts.required_margin.to(dtype)[:, None]
    loss = (weight * _LOSSES[kind](signed)).sum(-1)
    total = (facts.weight.to(dtype) * loss).sum()
    return PairLossOutput(total, loss.detach(), reward.detach(), margin.detach())


def unit(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """x / |x|; the zero vector stays zero and receives no gradient."""
    square = x.square().sum(-1, keepdim=True)
    safe = torch.where(square > 0, square, 1.0)
    return x * torch.where(square > 0, safe.rsqrt(), 0.0)


def mix(
    logits: Float[Tensor, "U K"],
    user: Int[Tensor, "n"],
    prototypes: Float[Tensor, "Q K h"],
    source: Int[Tensor, "n"],
    temperature: float,
) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n K"]]:
    """(sum_k s_k prototypes[source, k], s) with s = softmax(logits[user] / temperature)."""
    dtype = working_dtype(logits, prototypes)
    rows = torch.nn.functional.embedding(user, logits).to(dtype)
    mixture = torch.softmax(rows / temperature, dim=-1)
    chosen = torch.nn.functional.embedding(source, prototypes.flatten(1)).to(dtype)
    return torch.einsum("nk,nkh->nh", mixture, chosen.unflatten(-1, prototypes.shape[1:])), mixture


def score_all(
    mixture: Float[Tensor, "U K"],
    response: Float[Tensor, "N d"],
    prototypes: Float[Tensor, "Q K d"],
    source: Int[Tensor, "N"],
    scale: float | None,
) -> Float[Tensor, "U N"]:
    """Reward of every item for every user, each user's point formed in full; see `kernels.score_all`."""
    dtype = working_dtype(mixture, response, prototypes)
    point = torch.einsum("uk,qkd->uqd", mixture.to(dtype), prototypes.to(dtype))
    if scale is not None:
        return scale * torch.einsum("und,nd->un", unit(point)[:, source], unit(response.to(dtype)))
    return -torch.linalg.vector_norm(response.to(dtype) - point[:, source], dim=-1)
