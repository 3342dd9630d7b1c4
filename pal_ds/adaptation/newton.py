"""The mixtures of many new users at once, from the statistics of their comparisons alone, by damped Newton steps.

Minimised per user over logits w, with s the point that they stand for (`heads/mixture.py`: softmax(w / tau), or signed
weights):  sum_i loss(label_i margin_i(s)) + prior(w).
Margins are differences of rewards by `heads.sufficient_statistics`, so a step costs K numbers per scored position. They
are not convex in s (distances, cosines), and a softmax has no finite minimiser where the comparisons can be separated:
hence several starts, and a prior that makes the objective coercive. Where the prior has clusters, few comparisons may
leave several of them likely: a user is then the mean of its minima, one in each, weighted by their evidence (Laplace).

Steps are those of Gauss and Newton with Levenberg's damping: the margin's own curvature in s is left out, that of the
softmax is not. The matrix may then be indefinite far from a minimum; a step that would not descend, or does not descend
as promised, is taken again with more damping.

Users lie along the last axis, no operation mixes them, and a user's padding depends on that user alone. Who else is
fitted in the same call still moves the rounding of sums, and so the step after which a user is done: by less than 1e-3
in a logit and 1e-6 in the objective. Axes: U users, L lanes (a user from one start), N terms of a user (scored
positions of all their comparisons, padded), K prototypes.
"""

import torch
from torch import Tensor

from pal_ds.adaptation.blocks import UserComparisons, blocks, with_sure_labels
from pal_ds.adaptation.objective import Objective, Point, shape_of
from pal_ds.adaptation.prior import LogitPrior, mean_over_components
from pal_ds.distributed import phase
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.heads.sufficient_statistics import MixtureStatistics
from pal_ds.losses import PreferenceLoss

NUM_KEPT = 3
"""Starts that are followed, per user: those with the lowest objective."""
NUM_STEPS_OF_ALL = 3
"""After as many steps only the best of them goes on: by then each is in the valley that it will end in."""
MAX_STEPS = 40
TOLERANCE = 1e-6
"""A lane ends where its next undamped step promises less than half of this, in nats."""


@torch.no_grad()
def solve(
    statistics: MixtureStatistics,
    comparisons: UserComparisons,
    num_users: int,
    prior: LogitPrior,
    loss: PreferenceLoss,
) -> Float[Tensor, "U K"]:
    """Centred logits of each user, fp32: the lowest objective that descent from any of the prior's starts finds.

    Where the prior has clusters, the mean mixture over components (see above). A user without comparisons, or with
    features that are no numbers, gets the prior's mean. The kind of `loss` is one of SHAPES.
    """
    logits = prior.mean.repeat(num_users, 1)
    shape = shape_of(loss, comparisons.threshold)
    statistics, comparisons = with_sure_labels(statistics, comparisons, loss.ties)
    for block in blocks(statistics, comparisons, num_users, loss.token_weighting):
        objective = Objective(block, statistics, shape, prior)
        logits[block.users] = _descend(objective).T
    return logits


def _descend(objective: Objective) -> Float[Tensor, "K U"]:
    """The logits of each user of the objective's block."""
    starts = objective.prior.starts
    # A value that is no number is the last choice, but a choice.
    values = objective.values_of_all(starts).nan_to_num(nan=torch.inf)
    order = torch.argsort(values, dim=0, stable=True)[:NUM_KEPT]
    objective.follow(starts.component[order])
    minima = _follow(objective, starts.points[starts.point_index[order.flatten()]].T, len(order))
    logits = minima.logits.view(-1, *order.shape)
    if objective.prior.num_components == 1:
        leads = _leaders(minima.value.view(order.shape)).view(order.shape)
        return torch.where(leads, logits, 0.0).sum(1)
    # Where a softmax saturates the objective bends less than the prior, or down: Laplace's volume would have no bound.
    least = pivots(objective.prior.precisions.permute(1, 2, 0))
    volume = pivots(minima.curvature, least[:, starts.component[order].flatten().clamp(max=1)])
    evidence = -minima.value - 0.5 * volume.log().sum(0)
    prior, tau = objective.prior, objective.temperature
    return mean_over_components(prior, tau, values, order, logits, evidence.view(order.shape))


def _follow(objective: Objective, begin: Float[Tensor, "K L"], num_kept: int) -> Point:
    """Descend from these lanes, `num_kept` of each user; only the best of a user's goes all the way."""
    point = objective(begin)
    ended = Point(*(part.clone() for part in point))
    num_lanes = len(point.value)
    left = torch.arange(num_lanes, device=begin.device)
    damping = torch.zeros_like(point.value)
    for number in range(MAX_STEPS):
        phase.progress()
        matrix = point.curvature + damping * objective.own.precision
        step = solve_positive_definite(matrix, -point.gradient)
        promise = -(step * point.gradient).sum(0)
        trial = objective(point.logits + step)
        # At the minimum the objective is flat to its last digit; where it bends down, a step leads up.
        better = (trial.value <= point.value + 1e-6 * point.value.abs()) & (promise >= 0)
        point = trial.or_else(point, better)
        shorter = torch.where(damping > 1e-3, damping * 0.1, 0.0)
        damping = torch.where(better, shorter, (damping * 10).clamp(min=0.1))
        # Under damping a step promises little however far the minimum is.
        going = ~(better & (promise < TOLERANCE) & (damping <= 0.1)) & (damping < 1e6)
        if number + 1 == NUM_STEPS_OF_ALL:
            ended.put(left, point)
            going &= _leaders(ended.value.view(num_kept, -1))[left]
        num_going = int(going.sum())
        if num_going == 0:
            break
        if num_going < 0.7 * len(going):
            ended.put(left, point)
            kept = going.nonzero().squeeze(1)
            left, damping, point = left[kept], damping[kept], point.take(kept)
            objective.keep(kept)
    ended.put(left, point)
    return ended


def _leaders(values: Float[Tensor, "M U"]) -> Tensor:
    """Mark the best lane of each user so far, the first of equals; bool [M U], flat."""
    place = torch.arange(len(values), device=values.device)[:, None]
    return (place == values.nan_to_num(nan=torch.inf).argmin(0)).flatten()


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


def pivots(
    matrix: Float[Tensor, "K K L"], least: Float[Tensor, "K L"] | None = None
) -> Float[Tensor, "K L"]:
    """Pivots of each lane's matrix by the same elimination; their product is its determinant. `least` bounds them."""
    matrix, chosen = matrix.clone(), []
    for k in range(len(matrix)):
        chosen.append(matrix[k, k] if least is None else torch.maximum(matrix[k, k], least[k]))
        factor = matrix[k + 1 :, k] / chosen[-1]
        matrix[k + 1 :, k + 1 :] -= factor[:, None] * matrix[k, k + 1 :]
    return torch.stack(chosen)
