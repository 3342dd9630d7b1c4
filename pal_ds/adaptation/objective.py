"""Objective of adaptation, with its slopes and curvature, for many users side by side.

Axes as in `newton.py`: U users, L lanes (a user from one start), N terms of a user, K prototypes.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pal_ds.adaptation.blocks import Block
from pal_ds.adaptation.prior import LogitPrior, Starts
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.heads.sufficient_statistics import (
    SMALLEST_SQUARE,
    MixtureStatistics,
    PointSpace,
    RewardShape,
    combine,
    point_of,
)
from pal_ds.losses import PreferenceLoss
from pal_ds.tie_models import win_loss

SMALLEST_GAP = 1e-2
"""Closest to its kink that a hinge is taken to curve."""

Shape = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]


def _logistic(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    wrong = torch.sigmoid(-m)
    return -torch.nn.functional.logsigmoid(m), -wrong, wrong * (1 - wrong)


def _hinge(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gap = 1 - m
    # The quadratic that lies above the hinge and touches it here (de Leeuw and Lange 2009).
    return gap.relu(), -(gap > 0).to(m.dtype), 0.5 / gap.abs().clamp(min=SMALLEST_GAP)


def _smooth_hinge(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    gap = (1 - m).relu()
    value = torch.where(gap < 1, gap.square() / 2, gap - 0.5)
    # Beyond 1 it is straight: the curvature of the quadratic above it, as for the hinge.
    return value, -gap.clamp(max=1), torch.where(gap > 0, 1 / gap.clamp(min=1), 0.0)


SHAPES: dict[str, Shape] = {"logistic": _logistic, "hinge": _hinge, "smooth_hinge": _smooth_hinge}
"""Value, slope and curvature of the losses that can be solved for, by their names in `losses`."""


def shape_of(loss: PreferenceLoss, threshold: Float[Tensor, "1"] | None) -> Shape:
    """The shape of a loss, under this threshold of ties."""
    if loss.ties != "davidson" or threshold is None:
        return SHAPES[loss.kind]

    def davidson(m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # log z and its derivatives: the chances of losing and of a tie, which count m in full and by half.
        value = win_loss(m, threshold, "davidson")
        lost, tied = torch.exp(-m - value), threshold * torch.exp(-m / 2 - value)
        slope = lost + tied / 2
        return value, -slope, lost + tied / 4 - slope.square()

    return davidson


class Point(NamedTuple):
    """Lanes' logits with the objective, its gradient and curvature there."""

    logits: Float[Tensor, "K L"]
    value: Float[Tensor, "L"]
    gradient: Float[Tensor, "K L"]
    curvature: Float[Tensor, "K K L"]

    def take(self, lanes: Tensor) -> "Point":
        return Point(*(part.index_select(-1, lanes) for part in self))

    def put(self, lanes: Tensor, other: "Point") -> None:
        for mine, new in zip(self, other, strict=True):
            mine[..., lanes] = new

    def or_else(self, other: "Point", mine: Tensor) -> "Point":
        return Point(*(torch.where(mine, a, b) for a, b in zip(self, other, strict=True)))


class Objective:
    """The objective of the lanes of a block."""

    def __init__(
        self, block: Block, statistics: MixtureStatistics, shape: Shape, prior: LogitPrior
    ) -> None:
        self.block, self.shape, self.prior = block, shape, prior
        self.reward_shape: RewardShape = statistics.shape
        self.space: PointSpace = statistics.space
        self.temperature = statistics.temperature
        self.own = _OwnPrior.of(prior, None)

    def follow(self, component: Int[Tensor, "n U"]) -> None:
        """Repeat users n times from now on, each time under the component of the prior that is named."""
        self.block = self.block.repeat(len(component))
        if self.prior.num_components > 1:
            self.own = _OwnPrior.of(self.prior, component.flatten())

    def keep(self, lanes: Int[Tensor, "L"]) -> None:
        self.block, self.own = self.block.take(lanes), self.own.take(lanes)

    def values_of_all(self, starts: Starts) -> Float[Tensor, "S U"]:
        """The objective of every user at the same few starts: two products with all their statistics."""
        block, mixture = self.block, point_of(starts.points, self.space, self.temperature)
        linear = (mixture @ block.linear.flatten(2)).unflatten(2, block.linear.shape[2:])
        form = linear
        if self.reward_shape != "linear":
            squares = (mixture[:, :, None] * mixture[:, None]).flatten(1)
            form = squares @ block.quadratic.flatten(1, 2).flatten(2)
            form = form.unflatten(2, block.quadratic.shape[3:])
        if block.comparison is not None and self.reward_shape != "linear":
            form = form.gather(2, block.comparison.expand(*form.shape[:2], *block.comparison.shape))
        margin = _between(combine(linear, form, self.reward_shape))
        value = self.shape(block.label * margin - block.required)[0]
        cost = self.prior.penalty(starts.points[starts.point_index], starts.component)
        return (block.weight * value).sum(1)[starts.point_index] + cost[:, None]

    def __call__(self, logits: Float[Tensor, "K L"]) -> Point:
        """The objective with its gradient and its Gauss-Newton curvature in the logits."""
        block, mixture = self.block, point_of(logits, self.space, self.temperature, 0)
        reward, jacobian = self._rewards(mixture)
        signed = block.label * _between(reward) - block.required
        value, slope, bend = self.shape(signed)
        gradient = (jacobian * (block.weight * slope * block.label)).sum(1)
        weighed = jacobian * (block.weight * bend * block.label.square())
        num_prototypes = len(mixture)
        curvature = gradient.new_empty(num_prototypes, *gradient.shape)
        for k in range(num_prototypes):
            row = (weighed[k] * jacobian[k:]).sum(1)
            curvature[k, k:], curvature[k:, k] = row, row
        gradient, curvature = through_point(
            gradient, curvature, mixture, space=self.space, temperature=self.temperature
        )
        penalty, pull = self.own.penalty(logits)
        total = (block.weight * value).sum(0) + penalty
        return Point(logits, total, gradient + pull, curvature + self.own.precision)

    def _rewards(self, mixture: Float[Tensor, "K L"]) -> tuple[Tensor, Tensor]:
        """Rewards [r, N, L] and d margin / d mixture [K, N, L]; response_0 counts against."""
        block, linear = self.block, weighted_sum(self.block.linear, mixture)
        if self.reward_shape == "linear":
            return linear, _between(block.linear)
        product, form = self._form(mixture)
        reward = combine(linear, form, self.reward_shape)
        of_linear, of_product = self._slopes(reward, form)
        side = (block.linear * of_linear[:, None]).addcmul_(product, of_product[:, None])
        return reward, _between(side)

    def _form(self, mixture: Float[Tensor, "K L"]) -> tuple[Tensor, Tensor]:
        """quadratic s and s^T quadratic s at every term: [1 or 2, K, 1 or N, L] and [1 or 2, 1 or N, L]."""
        block, num_users = self.block, self.block.quadratic.shape[-1]
        # The matrices are symmetric: either axis of theirs may be summed over. Lanes of a user share theirs.
        apart = mixture.unflatten(1, (-1, num_users))
        product = weighted_sum(block.quadratic.unsqueeze(-2), apart).flatten(-2)
        form = weighted_sum(product, mixture)
        if block.comparison is None:
            return product, form
        index = block.comparison.expand(len(form), *block.comparison.shape)
        wide = index.unsqueeze(1).expand(-1, product.shape[1], -1, -1)
        return product.gather(2, wide), form.gather(1, index)

    def _slopes(self, reward: Tensor, form: Tensor) -> tuple[Tensor, Tensor]:
        """d reward / d (s . linear), and the factor of `quadratic s` in d reward / d s."""
        if self.reward_shape == "distance":
            flat = reward.square() <= SMALLEST_SQUARE
            half = torch.where(flat, 0.0, 0.5 / reward.clamp(max=-(SMALLEST_SQUARE**0.5)))
            return half, -half
        inverse = torch.where(form > SMALLEST_SQUARE, form.clamp(min=SMALLEST_SQUARE).rsqrt(), 0.0)
        return inverse, -reward * inverse.square()


def through_point(
    gradient: Float[Tensor, "K L"],
    curvature: Float[Tensor, "K K L"],
    mixture: Float[Tensor, "K L"],
    *,
    space: PointSpace,
    temperature: float,
) -> tuple[Float[Tensor, "K L"], Float[Tensor, "K K L"]]:
    """Gradient and curvature in the logits from those in the point, exactly: the map's own curvature is in it.

    The Jacobian of a softmax is (diag s - s s^T) / tau; of `linear` 1 / (K tau), of `affine` that of centred logits.
    """
    if space != "simplex":
        factor = 1 / (len(mixture) * temperature)
        if space == "affine":
            gradient = gradient - gradient.mean(0)
            curvature = curvature - curvature.mean(0)
            curvature = curvature - curvature.mean(1, keepdim=True)
        return gradient * factor, curvature * factor**2
    through = mixture / temperature
    gradient = through * (gradient - (mixture * gradient).sum(0))
    curvature = through * (curvature - (mixture * curvature).sum(1, keepdim=True))
    curvature = through[:, None] * (curvature - (mixture[:, None] * curvature).sum(0))
    cross = through[:, None] * gradient
    curvature -= cross + cross.transpose(0, 1)
    curvature.diagonal(0, 0, 1).T.add_(gradient / temperature)
    return gradient, curvature


class _OwnPrior(NamedTuple):
    """The component of the prior that each lane is under; L is 1 where that is one for all."""

    mean: Float[Tensor, "K L"]
    precision: Float[Tensor, "K K L"]
    height: Float[Tensor, "L"]

    @staticmethod
    def of(prior: LogitPrior, component: Int[Tensor, "L"] | None) -> "_OwnPrior":
        """Everybody, or the component of each lane."""
        if component is None:
            return _OwnPrior(
                prior.mean[:, None], prior.precisions[0, :, :, None], prior.heights[:1]
            )
        precision = prior.precisions.permute(1, 2, 0)[:, :, component.clamp(max=1)]
        return _OwnPrior(prior.means.T[:, component], precision, prior.heights[component])

    def take(self, lanes: Int[Tensor, "L"]) -> "_OwnPrior":
        if self.mean.shape[1] == 1:
            return self
        return _OwnPrior(*(part.index_select(-1, lanes) for part in self))

    def penalty(self, logits: Float[Tensor, "K L"]) -> tuple[Tensor, Tensor]:
        """Minus the log density at centred logits, and its gradient."""
        away = logits - self.mean
        pull = (self.precision * away).sum(1)
        return 0.5 * (away * pull).sum(0) - self.height, pull


def _between(pair: Float[Tensor, "r *n"]) -> Float[Tensor, "*n"]:
    """response_1 minus response_0, where the terms do not hold that already (r = 1)."""
    return pair[1] - pair[0] if len(pair) == 2 else pair[0]


def weighted_sum(
    parts: Float[Tensor, "s K *rest"], weights: Float[Tensor, "K *L"]
) -> Float[Tensor, "s *rest_L"]:
    """sum_k weights_k parts_k, one k after the other: no product of the size of `parts` is ever held."""
    total = parts[:, 0] * weights[0]
    for k in range(1, len(weights)):
        total.addcmul_(parts[:, k], weights[k])
    return total
