"""Users as whole directions of a linear reward, under a Gaussian prior over directions.

The reward of a response with features h is <a_u, h>. Before any comparison a_u ~ N(mean, F^T F + s^2 I), with the rows
of F along what the run's users differ in. Its most likely value after a user's n comparisons is
    a_u = mean + (F^T F + s^2 I) D^T alpha
with D the differences of features in them: a Gaussian process over comparisons with a linear kernel (Rasmussen and
Williams 2006, section 3.4, Laplace's approximation), which costs n numbers per user in place of d. Few comparisons move
a_u within what is known of the run's users, many move it anywhere. Where n is above r + d, the same is sought among the
r + d coordinates b of a_u = mean + (F^T, s I) b, of which b ~ N(0, I).

Axes: U users, n terms of a user (scored positions of all comparisons, padded), d width of the features, r factors.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pal_ds.adaptation.objective import Shape
from pal_ds.distributed import phase
from pal_ds.heads.jaxtyping_fallback import Float

MAX_STEPS = 50
MAX_HALVINGS = 20
TOLERANCE = 1e-6
"""A fit ends where no user's objective falls by more than this in a step, in nats."""


class Labels(NamedTuple):
    """Labels that users gave their terms; fp64."""

    label: Float[Tensor, "U n"]
    required: Float[Tensor, "U n"]
    """Margin that is required of the preferred response."""
    weight: Float[Tensor, "U n"]
    """0 for padding."""


class Fit(NamedTuple):
    """The most likely margins of each user."""

    alpha: Float[Tensor, "U n"]
    """Weights of the user's own terms: margins are expected + gram alpha."""
    log_evidence: Float[Tensor, "U"]
    """Log probability of the labels before they were seen, by Laplace's approximation; in nats."""


def most_likely(
    gram: Float[Tensor, "U n n"],
    expected: Float[Tensor, "U n"],
    labels: Labels,
    shape: Shape,
    *,
    begin: Float[Tensor, "U n"] | None = None,
    tolerance: float = TOLERANCE,
) -> Fit:
    """Maximise the likelihood of each user's labels times the density of margins N(expected, gram).

    Newton's steps in the dual, halved where they overshoot. All fp64: small matrices may be near singular. `shape` is
    a convex loss of the signed margin with its slope and curvature, see `objective.SHAPES`; `begin` the alpha to start
    from.
    """

    def value_of(alpha: Tensor) -> Tensor:
        away = times(gram, alpha)
        return _loss(labels, shape, expected + away)[0] + 0.5 * (alpha * away).sum(-1)

    alpha = torch.zeros_like(expected) if begin is None else begin
    away = times(gram, alpha)
    objective, slope, bend = _loss(labels, shape, expected + away)
    objective = objective + 0.5 * (alpha * away).sum(-1)
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for _ in range(MAX_STEPS):
        phase.progress()
        root = bend.sqrt()
        factor = torch.linalg.cholesky(eye + root.unsqueeze(-1) * gram * root.unsqueeze(-2))
        aim = bend * times(gram, alpha) - slope
        solved = torch.cholesky_solve((root * times(gram, aim)).unsqueeze(-1), factor)
        trial = aim - root * solved.squeeze(-1)
        best, total = _halved(value_of, alpha, objective, trial)
        gained = (objective - total).max()
        alpha, objective = best, total
        _, slope, bend = _loss(labels, shape, expected + times(gram, alpha))
        if gained < tolerance:
            break
    root = bend.sqrt()
    factor = torch.linalg.cholesky(eye + root.unsqueeze(-1) * gram * root.unsqueeze(-2))
    volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return Fit(alpha, -objective - volume)


def most_likely_coordinates(
    features: Float[Tensor, "U n m"], expected: Float[Tensor, "U n"], labels: Labels, shape: Shape
) -> Float[Tensor, "U m"]:
    """Maximise the likelihood of margins expected + features b times the density N(0, I) of b.

    The other arguments and the steps are those of `most_likely`, whose gram is features features^T.
    """

    def value_of(point: Tensor) -> Tensor:
        value = _loss(labels, shape, expected + times(features, point))[0]
        return value + 0.5 * point.square().sum(-1)

    point = features.new_zeros(features.shape[0], features.shape[2])
    objective = value_of(point)
    eye = torch.eye(features.shape[2], dtype=features.dtype, device=features.device)
    for _ in range(MAX_STEPS):
        phase.progress()
        _, slope, bend = _loss(labels, shape, expected + times(features, point))
        curvature = features.mT @ (bend.unsqueeze(-1) * features) + eye
        downhill = times(features.mT, slope) + point
        step = torch.cholesky_solve(downhill.unsqueeze(-1), torch.linalg.cholesky(curvature))
        point, total = _halved(value_of, point, objective, point - step.squeeze(-1))
        gained, objective = (objective - total).max(), total
        if gained < TOLERANCE:
            break
    return point


def _halved(
    value_of: Callable[[Tensor], Tensor],
    alpha: Float[Tensor, "U n"],
    objective: Float[Tensor, "U"],
    trial: Float[Tensor, "U n"],
) -> tuple[Float[Tensor, "U n"], Float[Tensor, "U"]]:
    """The trial where the objective is no worse there, else a point on the way to it; with the objective."""
    size = torch.ones_like(objective)
    total, point = objective, alpha
    for _ in range(MAX_HALVINGS):
        point = alpha + size.unsqueeze(-1) * (trial - alpha)
        total = value_of(point)
        worse = ~(total <= objective)
        if not worse.any():
            break
        size = torch.where(worse, size / 2, size)
    better = total <= objective
    return torch.where(better.unsqueeze(-1), point, alpha), torch.where(better, total, objective)


def times(matrix: Float[Tensor, "U n m"], vector: Float[Tensor, "U m"]) -> Float[Tensor, "U n"]:
    """The product of each user's matrix and vector."""
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _loss(
    labels: Labels, shape: Shape, margin: Float[Tensor, "U n"]
) -> tuple[Float[Tensor, "U"], Float[Tensor, "U n"], Float[Tensor, "U n"]]:
    """Summed loss of each user, and slope and curvature in each margin."""
    value, slope, bend = shape(labels.label * margin - labels.required)
    weight = labels.weight
    return (weight * value).sum(-1), weight * labels.label * slope, weight * bend
