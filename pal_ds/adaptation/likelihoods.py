"""The comparisons of users as functions of what is fitted, for `posterior.py`: from statistics, or by a head's margins.

Axes as in `posterior.py`, and N scored positions of a user's comparisons, B comparisons of all users.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pal_ds.adaptation.blocks import Block
from pal_ds.adaptation.gradient import Losses
from pal_ds.adaptation.objective import Objective, Shape
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.heads.sufficient_statistics import MixtureStatistics, combine

PLACES_AT_ONCE = 4
"""Places of every user at which a head's own margins are computed together."""
STEP = 0.05
"""Of the differences that stand for derivatives, in a logit; fp32 losses then tell curvatures apart to some 1e-2."""


class ByStatistics(NamedTuple):
    """The comparisons of a block's users, from K numbers per scored position."""

    block: Block
    statistics: MixtureStatistics
    shape: Shape
    prior: LogitPrior

    def log_value(
        self, fitted: Float[Tensor, "U M K"], point: Float[Tensor, "U M K"]
    ) -> Float[Tensor, "U M"]:
        block = self.block
        sides, width, num_terms, num_users = block.linear.shape
        table = block.linear.permute(3, 1, 0, 2).reshape(num_users, width, sides * num_terms)
        linear = torch.bmm(point, table).unflatten(2, (sides, num_terms))
        form = linear if self.statistics.shape == "linear" else self._form(point)
        reward = combine(linear, form, self.statistics.shape)
        margin = reward[:, :, 1] - reward[:, :, 0] if sides == 2 else reward[:, :, 0]
        label, required, weight = (
            part.T[:, None] for part in (block.label, block.required, block.weight)
        )
        value = self.shape(label * margin - required)[0]
        return -(weight * value).sum(-1)

    def _form(self, point: Float[Tensor, "U M K"]) -> Float[Tensor, "U M s N"]:
        """s^T quadratic s of each scored position; the last two axes are 1 where one serves all."""
        matrices, index = self.block.quadratic, self.block.comparison
        if len(matrices) == matrices.shape[-2] == matrices.shape[-1] == 1:
            form = ((point @ matrices[0, :, :, 0, 0]) * point).sum(-1)
            return form[:, :, None, None]
        sides, width, _, num_comparisons, num_users = matrices.shape
        squares = (point.unsqueeze(-1) * point.unsqueeze(-2)).flatten(2)
        table = matrices.permute(4, 1, 2, 0, 3).reshape(num_users, width * width, -1)
        form = torch.bmm(squares, table).unflatten(2, (sides, num_comparisons))
        if index is None:
            return form
        return form.gather(3, index.T[:, None, None].expand(*form.shape[:3], -1))

    def curvature(self, fitted: Float[Tensor, "U K"]) -> Float[Tensor, "U K K"]:
        objective = Objective(self.block, self.statistics, self.shape, self.prior)
        curvature = objective(fitted.T.contiguous()).curvature
        return curvature.permute(2, 0, 1) - self.prior.precisions[0]


class ByLosses(NamedTuple):
    """The comparisons of some users, from the losses that `adam` minimises: for a head without statistics."""

    losses: Losses
    owner: Int[Tensor, "B"]

    def log_value(
        self, fitted: Float[Tensor, "U M K"], point: Float[Tensor, "U M K"]
    ) -> Float[Tensor, "U M"]:
        num_users = len(fitted)
        rows = torch.arange(len(self.owner), device=self.owner.device)
        parts = []
        for places in fitted.transpose(0, 1).split(PLACES_AT_ONCE):
            each = self.losses(places, rows)
            parts.append(-each.new_zeros(len(places), num_users).index_add(1, self.owner, each))
        return torch.cat(parts).T

    def curvature(self, fitted: Float[Tensor, "U K"]) -> Float[Tensor, "U K K"]:
        """By central differences: a step each way along each coordinate, and along each pair of them."""
        width = fitted.shape[1]
        steps = STEP * torch.eye(width, device=fitted.device)
        first, second = torch.triu_indices(width, width, device=fitted.device)
        both = torch.where((first == second)[:, None], steps[first], steps[first] + steps[second])
        moves = torch.cat([torch.zeros_like(steps[:1]), both, -both])
        values = self.log_value(fitted[:, None] + moves, fitted)
        here, (up, down) = values[:, :1], values[:, 1:].chunk(2, 1)
        along = (2 * here - up - down) / STEP**2
        own = along[:, first == second]
        matrix = fitted.new_zeros(len(fitted), width, width)
        cross = (along - own[:, first] - own[:, second]) / 2
        matrix[:, first, second] = matrix[:, second, first] = cross
        matrix.diagonal(dim1=1, dim2=2).copy_(own)
        return matrix
