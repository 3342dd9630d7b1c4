"""New users with a direction of their own: prior from the run's users, and the fit of many users at once.

A user's reward is linear in K weights s and a residual e of d numbers (`heads.base.Head.residual_size`). The prior is
    s ~ N(level m, spread^2 C + along^2 m m^T)        e ~ N(0, residual^2 I)
with m and C the mean and covariance of the run's users' weights. The four numbers are those under which the run's
users' own comparisons are likeliest, each user met as a new one, of whom m and C know nothing (empirical Bayes by
leave-one-out evidence, under a weak prior over the four). A negative level says that the run's users are against whom
they have not met: writers who each prefer their own answer to all others', say.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy.optimize import minimize
from torch import Tensor

from pal_ds.adaptation.blocks import UserComparisons, padded_terms, with_sure_labels
from pal_ds.adaptation.objective import Shape, shape_of
from pal_ds.adaptation.reward_vectors import Labels, most_likely, most_likely_coordinates
from pal_ds.heads.base import Features, Head
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.heads.sufficient_statistics import MixtureStatistics
from pal_ds.losses import PreferenceLoss

BYTES_PER_BLOCK = 2**28
"""Differences of features of the users that are fitted side by side."""
MOST_LEFT_OUT = 64
"""Of more users each changes mean and covariance too little to matter, and is left in."""
MAX_EVALUATIONS = 120
HYPERPRIOR_SPREADS = (3.0, 1.0, 1.0, 1.0)
"""Standard deviations of the strengths about (1, log 1, log 1, a residual that moves margins by a half). Where users
never contradict themselves, evidence alone would let all strengths grow without bound."""
FIRST_STEPS = (0.5, 0.7, 0.7, 1.0)
"""How far each of the four strengths is varied at first: the level, and three logarithms."""
EVIDENCE_TOLERANCE = 1e-3
"""Nats to which each user's evidence is known while strengths are compared."""


@dataclass(frozen=True)
class DirectionPrior:
    """N(mean, factors^T factors) over K weights and N(0, residual_variance I) over d numbers, independent."""

    point: Float[Tensor, "K"]
    """Mean of the weights; fp64, as is the rest."""
    factors: Float[Tensor, "r K"]
    residual_variance: float
    mean: Float[Tensor, "K+d"]
    """Logits of a user without comparisons, fp32."""
    reliability_variance: float | None = None
    """Of the log of users' reliability; None where they have none."""


class Terms(NamedTuple):
    """Comparisons of some users, padded; fp64."""

    users: Int[Tensor, "U"]
    scores: Float[Tensor, "U n K"]
    """Differences of the K rewards of both responses."""
    difference: Float[Tensor, "U n d"]
    """Differences of what the residual is multiplied by."""
    labels: Labels


class _Strengths(NamedTuple):
    level: float
    log_spread: float
    log_along: float
    log_residual: float


def fit_directions(
    head: Head,
    features: Features,
    comparisons: UserComparisons,
    num_users: int,
    *,
    prior: DirectionPrior,
    loss: PreferenceLoss,
) -> Float[Tensor, "U K+d"]:
    """Logits of each user, fp32: the most likely weights and residual. Who has no comparison gets the prior's mean."""
    device = features.response.device
    logits = prior.mean.to(device).repeat(num_users, 1)
    point, factors = prior.point.to(device), prior.factors.to(device)
    shape = shape_of(loss, comparisons.threshold)
    for terms in terms_by_user(head, features, comparisons, num_users, loss):
        weights, residual = _most_likely_direction(terms, point, factors, prior, shape)
        fitted = torch.cat([_logits_of(weights, head), residual], -1)
        # Comparisons whose features are no numbers say nothing.
        sound = fitted.isfinite().all(-1, keepdim=True)
        logits[terms.users] = torch.where(sound, fitted.float(), logits[terms.users])
    return logits


def _most_likely_direction(
    terms: Terms,
    point: Float[Tensor, "K"],
    factors: Float[Tensor, "r K"],
    prior: DirectionPrior,
    shape: Shape,
) -> tuple[Float[Tensor, "U K"], Float[Tensor, "U d"]]:
    """Weights and residual of each user of `terms`, sought where there are fewer numbers: of terms or of directions."""
    along, expected = terms.scores @ factors.mT, terms.scores @ point
    num_factors, variance = len(factors), prior.residual_variance
    if along.shape[1] > num_factors + terms.difference.shape[-1]:
        coordinates = torch.cat([along, variance**0.5 * terms.difference], -1)
        best = most_likely_coordinates(coordinates, expected, terms.labels, shape)
        weights = point + best[:, :num_factors] @ factors
        return weights, variance**0.5 * best[:, num_factors:]
    gram = along @ along.mT + variance * (terms.difference @ terms.difference.mT)
    alpha = most_likely(gram, expected, terms.labels, shape).alpha.unsqueeze(-2)
    weights = point + (alpha @ along).squeeze(-2) @ factors
    return weights, variance * (alpha @ terms.difference).squeeze(-2)


def terms_by_user(
    head: Head,
    features: Features,
    comparisons: UserComparisons,
    num_users: int,
    loss: PreferenceLoss,
) -> Iterator[Terms]:
    """Every user with at least one term, each in one block of users with about as many."""
    statistics, residual = head.statistics(features), head.residual_features(features)
    assert isinstance(statistics, MixtureStatistics) and residual is not None, "no residual here"
    statistics, comparisons = with_sure_labels(statistics, comparisons, loss.ties)
    facts, scores = comparisons.facts, statistics.linear
    floats = 4 * (residual.shape[-1] + scores.shape[-1])
    for part in padded_terms(
        comparisons,
        num_users,
        loss.token_weighting,
        num_positions=scores.shape[1],
        floats_per_term=floats,
        floats_per_block=BYTES_PER_BLOCK // 4,
    ):
        pair = part.pair.T
        rows, position = statistics.response_index[pair], part.position.T
        labels = Labels(
            facts.label[pair].double(), facts.required_margin[pair].double(), part.weight.T.double()
        )
        of_span, of_residual = (_between(each, rows, position) for each in (scores, residual))
        if comparisons.factor is not None:
            factor = comparisons.factor[part.users].double()[:, None, None]
            of_span, of_residual = factor * of_span, factor * of_residual
        yield Terms(part.users, of_span, of_residual, labels)


def _between(
    states: Float[Tensor, "R T n"], rows: Int[Tensor, "U n 2"], position: Int[Tensor, "U n"]
) -> Float[Tensor, "U n n"]:
    return states[rows[..., 1], position].double() - states[rows[..., 0], position].double()


def _logits_of(point: Float[Tensor, "*U K"], head: Head) -> Float[Tensor, "*U K"]:
    """Logits that stand for these weights: the inverse of `point_of` for `linear`."""
    return (point * point.shape[-1] - 1) * head.temperature


@dataclass
class _Grams:
    """Inner products of V users, of which evidence is made for any strengths."""

    spread: Float[Tensor, "V n n"]
    mean: Float[Tensor, "V n"]
    residual: Float[Tensor, "V n n"]
    labels: Labels
    alpha: Float[Tensor, "V n"] | None = None
    """The fit under the last strengths, near which the next one is."""

    def evidence(self, strengths: _Strengths, shape: Shape) -> float:
        """Log probability of all labels, in nats."""
        along = math.exp(strengths.log_along) * self.mean
        gram = math.exp(2 * strengths.log_spread) * self.spread
        gram = gram + along.unsqueeze(-1) * along.unsqueeze(-2)
        gram = gram + math.exp(2 * strengths.log_residual) * self.residual
        expected = strengths.level * self.mean
        fit = most_likely(
            gram, expected, self.labels, shape, begin=self.alpha, tolerance=EVIDENCE_TOLERANCE
        )
        self.alpha = fit.alpha
        return float(fit.log_evidence.sum())


def learn_prior(
    head: Head,
    points: Float[Tensor, "P K"],
    terms: list[Terms],
    owner: Int[Tensor, "U"],
    shape: Shape,
) -> DirectionPrior:
    """The prior under which comparisons of the run's users are likeliest.

    Args:
        head: of the run.
        points: weights of the run's users.
        terms: comparisons of some of them, a user once or several times with different ones.
        owner: row of `points` of each user of `terms`.
        shape: of the loss.
    """
    points = points.double()
    grams = [_grams(one, points, owner[one.users]) for one in terms]
    scale = _residual_scale(grams)

    def cost(numbers: Sequence[float]) -> float:
        away = [(n - m) / s for n, m, s in zip(numbers, expected, HYPERPRIOR_SPREADS, strict=True)]
        strengths = _Strengths(*numbers)
        evidence = sum(each.evidence(strengths, shape) for each in grams)
        return 0.5 * math.fsum(a * a for a in away) - evidence

    expected = [1.0, 0.0, 0.0, scale]

    starts = [[level, *expected[1:]] for level in (1.0, 0.0, -1.0)]
    best = min(starts, key=cost) if grams else starts[0]
    if grams:
        corners = [best] + [
            [number + step * (place == moved) for place, number in enumerate(best)]
            for moved, step in enumerate(FIRST_STEPS)
        ]
        options = {"initial_simplex": corners, "maxfev": MAX_EVALUATIONS}
        options |= {"xatol": 0.05, "fatol": 0.2}
        best = minimize(cost, best, method="Nelder-Mead", options=options).x.tolist()
    return _prior(head, points, _Strengths(*best))


def _prior(head: Head, points: Float[Tensor, "P K"], strengths: _Strengths) -> DirectionPrior:
    mean, covariance = _moments(points)
    factors = torch.cat(
        [
            math.exp(strengths.log_spread) * _root(covariance),
            math.exp(strengths.log_along) * mean.unsqueeze(0),
        ]
    )
    point = strengths.level * mean
    logits = torch.cat([_logits_of(point, head), point.new_zeros(head.residual_size)])
    variance = math.exp(2 * strengths.log_residual)
    return DirectionPrior(point.cpu(), factors.cpu(), variance, logits.float().cpu())


def _moments(points: Float[Tensor, "P K"]) -> tuple[Float[Tensor, "K"], Float[Tensor, "K K"]]:
    if len(points) == 0:
        size = points.shape[1]
        return points.new_full((size,), 1 / size), torch.eye(size, dtype=points.dtype) / size
    mean = points.mean(0)
    return mean, (points - mean).T @ (points - mean) / len(points)


def _root(covariance: Float[Tensor, "K K"]) -> Float[Tensor, "K K"]:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()).T


def _grams(terms: Terms, points: Float[Tensor, "P K"], owner: Int[Tensor, "V"]) -> _Grams:
    """Inner products of the users of `terms` under what the other users are."""
    means, roots = [], []
    for row in owner.tolist():
        others = points
        if 1 < len(points) <= MOST_LEFT_OUT:
            others = torch.cat([points[:row], points[row + 1 :]])
        mean, covariance = _moments(others)
        means.append(mean)
        roots.append(_root(covariance))
    along = terms.scores @ torch.stack(roots).mT
    mean = (terms.scores @ torch.stack(means).unsqueeze(-1)).squeeze(-1)
    residual = terms.difference @ terms.difference.mT
    return _Grams(along @ along.mT, mean, residual, terms.labels)


def _residual_scale(grams: list[_Grams]) -> float:
    """Log of the residual's standard deviation at which it moves a margin by about a half."""
    sizes = [each.residual.diagonal(dim1=-2, dim2=-1).mean() for each in grams]
    if not sizes:
        return 0.0
    return math.log(0.5) - 0.5 * math.log(max(float(torch.stack(sizes).mean()), 1e-12))
