"""The mixtures of many new users at once, from the statistics of their comparisons alone, by damped Newton steps.

Minimised per user over logits w, with s = softmax(w / tau):  sum_i loss(label_i margin_i(s)) + prior(w).
Margins are differences of `heads.statistics` rewards, so a step costs K numbers per scored position. They are not
convex in s (distances, cosines), and a softmax has no finite minimiser where the comparisons can be separated: hence
several starts, and a prior that makes the objective coercive.

Steps are those of Gauss and Newton with Levenberg's damping: the margin's own curvature in s is left out, that of the
softmax is not. The matrix may then be indefinite far from a minimum; a step that would not descend, or does not descend
as promised, is taken again with more damping.

Users lie along the last axis, no operation mixes them, and a user's padding depends on that user alone. Who else is
fitted in the same call still moves the rounding of sums, and so the step after which a user is done: by less than 1e-3
in a logit and 1e-6 in the objective. Axes: U users, L lanes (a user from one start), N terms of a user (scored
positions of all their comparisons, padded), K prototypes.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pal_ds.heads.shapes import Float
from pal_ds.heads.statistics import SMALLEST_SQUARE, MixtureStatistics, combine
from pal_ds.terms import Block, Comparisons, blocks

NUM_KEPT = 3
"""Starts that are followed, per user: those with the lowest objective."""
NUM_STEPS_OF_ALL = 3
"""After as many steps only the best of them goes on: by then each is in the valley that it will end in."""
MAX_STEPS = 40
TOLERANCE = 1e-6
"""A lane ends where its next undamped step promises less than half of this, in nats."""
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


SHAPES: dict[str, Shape] = {
    "logistic": _logistic,
    "hinge": _hinge,
    "smooth_hinge": _smooth_hinge,
}
"""Value, slope and curvature of the losses that can be solved for, by their names in `losses`."""


class Prior(Protocol):
    """A Gaussian over centred logits, see `adapt.LogitPrior`."""

    @property
    def mean(self) -> Tensor: ...
    @property
    def precision(self) -> Tensor: ...


@torch.no_grad()
def solve(
    statistics: MixtureStatistics,
    comparisons: Comparisons,
    num_users: int,
    prior: Prior,
    starts: Float[Tensor, "S K"],
    kind: str,
) -> Float[Tensor, "U K"]:
    """Centred logits with the lowest objective that descent from any of the starts finds, fp32.

    `starts` are added to the prior's mean; a user without comparisons gets that mean. `kind` is one of SHAPES.
    """
    mean = prior.mean - prior.mean.mean()
    logits = mean.repeat(num_users, 1)
    candidates = mean + starts - starts.mean(1, keepdim=True)
    centring = torch.eye(len(mean), device=mean.device) - 1 / len(mean)
    # Gradients are orthogonal to the constant direction; any curvature there keeps the matrix regular.
    precision = centring @ prior.precision @ centring + 1 / len(mean)
    for block in blocks(statistics, comparisons, num_users):
        problem = _Problem(block, statistics, SHAPES[kind], mean, precision)
        logits[block.users] = _descend(problem, candidates).T
    return logits


class _Point(NamedTuple):
    """Lanes' logits with the objective, its gradient and curvature there."""

    logits: Float[Tensor, "K L"]
    value: Float[Tensor, "L"]
    gradient: Float[Tensor, "K L"]
    curvature: Float[Tensor, "K K L"]

    def take(self, lanes: Tensor) -> "_Point":
        return _Point(*(part.index_select(-1, lanes) for part in self))

    def or_else(self, other: "_Point", mine: Tensor) -> "_Point":
        return _Point(*(torch.where(mine, a, b) for a, b in zip(self, other, strict=True)))


class _Problem:
    """The objective of the lanes of a block."""

    def __init__(
        self,
        block: Block,
        statistics: MixtureStatistics,
        shape: Shape,
        mean: Tensor,
        precision: Tensor,
    ) -> None:
        self.block, self.shape = block, shape
        self.by_distance, self.temperature = statistics.by_distance, statistics.temperature
        self.mean, self.precision = mean[:, None], precision[:, :, None]

    def values_of_all(self, logits: Float[Tensor, "S K"]) -> Float[Tensor, "S U"]:
        """The objective of every user at the same few points: two products with all their statistics."""
        block, mixture = self.block, torch.softmax(logits / self.temperature, 1)
        linear = (mixture @ block.linear.flatten(2)).unflatten(2, block.linear.shape[2:])
        squares = (mixture[:, :, None] * mixture[:, None]).flatten(1)
        form = squares @ block.quadratic.flatten(1, 2).flatten(2)
        form = form.unflatten(2, block.quadratic.shape[3:])
        if block.comparison is not None:
            form = form.gather(2, block.comparison.expand(*form.shape[:2], *block.comparison.shape))
        margin = _between(combine(linear, form, self.by_distance))
        value = self.shape(block.label * margin - block.required)[0]
        return (block.weight * value).sum(1) + self._penalty(logits.T)[0][:, None]

    def __call__(self, logits: Float[Tensor, "K L"]) -> _Point:
        """The objective with its gradient and its Gauss-Newton curvature in the logits."""
        block, mixture = self.block, torch.softmax(logits / self.temperature, 0)
        product, form = self._form(mixture)
        reward = combine(weighted_sum(block.linear, mixture), form, self.by_distance)
        of_linear, of_product = self._slopes(reward, form)
        # d margin / d mixture; response_1 counts against.
        side = (block.linear * of_linear[:, None]).addcmul_(product, of_product[:, None])
        jacobian = _between(side)
        signed = block.label * _between(reward) - block.required
        value, slope, bend = self.shape(signed)
        gradient = (jacobian * (block.weight * slope * block.label)).sum(1)
        weighed = jacobian * (block.weight * bend)
        num_prototypes = len(mixture)
        curvature = gradient.new_empty(num_prototypes, *gradient.shape)
        for k in range(num_prototypes):
            row = (weighed[k] * jacobian[k:]).sum(1)
            curvature[k, k:], curvature[k:, k] = row, row
        # Through the softmax, whose Jacobian is (diag s - s s^T) / tau, on both sides.
        through = mixture / self.temperature
        gradient = through * (gradient - (mixture * gradient).sum(0))
        curvature = through * (curvature - (mixture * curvature).sum(1, keepdim=True))
        curvature = through[:, None] * (curvature - (mixture[:, None] * curvature).sum(0))
        cross = through[:, None] * gradient
        curvature -= cross + cross.transpose(0, 1)
        curvature.diagonal(0, 0, 1).T.add_(gradient / self.temperature)
        penalty, pull = self._penalty(logits)
        total = (block.weight * value).sum(0) + penalty
        return _Point(logits, total, gradient + pull, curvature + self.precision)

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
        if self.by_distance:
            flat = reward.square() <= SMALLEST_SQUARE
            half = torch.where(flat, 0.0, 0.5 / reward.clamp(max=-(SMALLEST_SQUARE**0.5)))
            return half, -half
        inverse = torch.where(form > SMALLEST_SQUARE, form.clamp(min=SMALLEST_SQUARE).rsqrt(), 0.0)
        return inverse, -reward * inverse.square()

    def _penalty(self, logits: Float[Tensor, "K L"]) -> tuple[Tensor, Tensor]:
        """Minus the log density of the prior at centred logits, and its gradient."""
        away = logits - self.mean
        pull = (self.precision * away).sum(1)
        return 0.5 * (away * pull).sum(0), pull


def _descend(problem: _Problem, candidates: Float[Tensor, "S K"]) -> Float[Tensor, "K U"]:
    """The best logits of each user of a block."""
    num_users = problem.block.label.shape[-1]
    values = problem.values_of_all(candidates)
    # A value that is no number is the last choice, but a choice.
    order = torch.argsort(values.nan_to_num(nan=torch.inf), dim=0, stable=True)[:NUM_KEPT]
    num_kept = len(order)
    problem.block = problem.block.repeat(num_kept)
    point = problem(candidates.T[:, order.flatten()])
    best_logits, best_value = point.logits.clone(), point.value.clone()
    left = torch.arange(num_kept * num_users, device=order.device)
    damping = torch.zeros_like(point.value)
    for number in range(MAX_STEPS):
        matrix = point.curvature + damping * problem.precision
        step = solve_positive_definite(matrix, -point.gradient)
        promise = -(step * point.gradient).sum(0)
        trial = problem(point.logits + step)
        # At the minimum the objective is flat to its last digit; where it bends down, a step leads up.
        better = (trial.value <= point.value + 1e-6 * point.value.abs()) & (promise >= 0)
        point = trial.or_else(point, better)
        shorter = torch.where(damping > 1e-3, damping * 0.1, 0.0)
        damping = torch.where(better, shorter, (damping * 10).clamp(min=0.1))
        best_logits[:, left], best_value[left] = point.logits, point.value
        # Under damping a step promises little however far the minimum is.
        going = ~(better & (promise < TOLERANCE) & (damping <= 0.1)) & (damping < 1e6)
        if number + 1 == NUM_STEPS_OF_ALL:
            going &= _leaders(best_value.view(num_kept, num_users))[left]
        num_going = int(going.sum())
        if num_going == 0:
            break
        if num_going < 0.7 * len(going):
            kept = going.nonzero().squeeze(1)
            left, damping, point = left[kept], damping[kept], point.take(kept)
            problem.block = problem.block.take(kept)
    leads = _leaders(best_value.view(num_kept, num_users)).view(num_kept, num_users)
    return torch.where(leads, best_logits.view(-1, num_kept, num_users), 0.0).sum(1)


def _leaders(values: Float[Tensor, "M U"]) -> Tensor:
    """Which of a user's lanes is the best so far, the first of equals; bool [M U], flat."""
    place = torch.arange(len(values), device=values.device)[:, None]
    return (place == values.nan_to_num(nan=torch.inf).argmin(0)).flatten()


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


def solve_positive_definite(
    matrix: Float[Tensor, "K K L"], vector: Float[Tensor, "K L"]
) -> Float[Tensor, "K L"]:
    """x with matrix x = vector for each lane: elimination without pivots, lanes side by side."""
    matrix, x = matrix.clone(), vector.clone()
    size = len(x)
    for k in range(size - 1):
        factor = matrix[k + 1 :, k] / matrix[k, k]
        matrix[k + 1 :, k + 1 :] -= factor[:, None] * matrix[k, k + 1 :]
        x[k + 1 :] -= factor * x[k]
    for k in reversed(range(size)):
        x[k] = (x[k] - (matrix[k, k + 1 :] * x[k + 1 :]).sum(0)) / matrix[k, k]
    return x
