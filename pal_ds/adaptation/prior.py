"""Prior of a new user before any comparison: the density of the run's own users' logits (empirical Bayes).

A mixture of Gaussians: one of everybody, and one around each cluster of the run's users where they fall into clusters.
A new user is like none of the run's U users with probability 1 / (U + 1), as in a Dirichlet process of concentration 1.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from pal_ds.adaptation.gaussian_mixture import find_clusters, shrunk
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.heads.sufficient_statistics import PointSpace, point_of
from pal_ds.users import UserTable
from pal_ds.users.ids import generic_row_of
from pal_ds.users.row_prior import basis_of
from pal_ds.users.rows import BLOCK_ROWS

VERTEX_LOGIT = 2.0
"""Logit by which a start leans towards its prototype."""


class Starts(NamedTuple):
    """S pairs of a point and a component of the prior. Where there are clusters, the last are their means, in order."""

    points: Float[Tensor, "n K"]
    point_index: Int[Tensor, "S"]
    component: Int[Tensor, "S"]


@dataclass(frozen=True)
class LogitPrior:
    """Over logits, centred where a shift of all K changes no point: all but signed weights of any sum (`linear`).

    Axes: M components, the first of which is everybody.
    """

    means: Float[Tensor, "M K"]
    """The first is the typical user, whom one without comparisons gets."""
    precisions: Float[Tensor, "P K K"]
    """Precision of everybody, and if M > 1 the one that all clusters share. Of centred logits: orthogonal to the
    constant direction but for a curvature of 1 along it, which keeps them regular."""
    heights: Float[Tensor, "M"]
    """Log density at the mean, up to a constant of all."""
    space: PointSpace = "simplex"
    """Where the logits' points lie."""
    reliability_variance: float | None = None
    """Of the log of users' reliability; None where they have none."""

    @staticmethod
    def gaussian(
        mean: Float[Tensor, "K"], precision: Float[Tensor, "K K"], space: PointSpace = "simplex"
    ) -> "LogitPrior":
        """Make the prior of one Gaussian, of all users."""
        if space != "linear":
            centring = torch.eye(len(mean)) - 1 / len(mean)
            precision = centring @ precision @ centring + 1 / len(mean)
            mean = mean - mean.mean()
        return LogitPrior(mean[None], precision[None], torch.zeros(1), space)

    @staticmethod
    def of(users: UserTable, space: PointSpace = "simplex") -> "LogitPrior":
        """Estimate the prior from the run's users, whose points lie in `space`.

        Where the run has a generic user, who is what users get at zero comparisons, everybody is centred there.
        """
        num_users, num_prototypes = users.logits.shape
        basis = basis_of(num_prototypes, space)
        # Block by block: of a table of millions one copy in fp64 is enough.
        blocks_of = [block.cpu().double() @ basis for block in users.logits.split(BLOCK_ROWS)]
        points = torch.cat(blocks_of) if blocks_of else basis.new_empty(0, basis.shape[1])
        generic, generic_row = None, generic_row_of(users.ids)
        if generic_row >= 0 and num_users > 1:
            generic, num_users = points[generic_row].clone(), num_users - 1
            points = torch.cat([points[:generic_row], points[generic_row + 1 :]])
        if num_users == 0:
            return LogitPrior.gaussian(
                torch.zeros(num_prototypes), torch.eye(num_prototypes), space
            )
        mean = points.mean(0) if generic is None else generic
        spread = points.sub_(mean)
        covariances = [shrunk(spread.T @ spread / num_users, num_users)]
        means, weights = (mean @ basis.T)[None], torch.ones(1, dtype=mean.dtype)
        if (clusters := find_clusters(spread)) is not None:
            means = torch.cat([means, (mean + clusters.mean) @ basis.T])
            covariances.append(clusters.covariance)
            weights = torch.cat([weights, num_users * clusters.weight]) / (num_users + 1)
        inverses = torch.linalg.inv(torch.stack(covariances))
        roots = 0.5 * torch.logdet(inverses)
        heights = weights.log() + torch.cat([roots[:1], roots[-1:].expand(len(means) - 1)])
        precisions = basis @ inverses @ basis.T
        if space != "linear":
            precisions = precisions + 1 / num_prototypes
        return LogitPrior(means.float(), precisions.float(), heights.float(), space)

    @property
    def mean(self) -> Float[Tensor, "K"]:
        """Logits of the typical user."""
        return self.means[0]

    @property
    def num_components(self) -> int:
        return len(self.means)

    def to(self, device: torch.device) -> "LogitPrior":
        names = ("means", "precisions", "heights")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @cached_property
    def starts(self) -> Starts:
        """Propose where to look for the best logits of a user, under which component.

        Everybody's mean and around it one towards each prototype, since the objective is not convex; the simplex's
        centre, where the population has taste and its mean is far from there; the means of clusters. The former under
        everybody and again under the cluster that they are likeliest in.
        """
        num_prototypes = self.means.shape[1]
        towards = VERTEX_LOGIT * torch.eye(num_prototypes, device=self.means.device)
        towards = towards - towards.mean(1, keepdim=True)
        around = torch.cat([self.mean[None], self.mean + towards])
        if self.mean.norm() > 0.5 * VERTEX_LOGIT:
            around = torch.cat([around, torch.zeros_like(around[:1])])
        points = torch.cat([around, self.means[1:]])
        index = torch.arange(len(points), device=points.device)
        everybody = torch.zeros_like(index[: len(around)])
        if self.num_components == 1:
            return Starts(points, index, everybody)
        clusters = torch.arange(1, self.num_components, device=points.device)
        costs = [self.penalty(around, one.expand(len(around))) for one in clusters]
        likeliest = clusters[torch.stack(costs).argmin(0)]
        index = torch.cat([index[: len(around)], index])
        return Starts(points, index, torch.cat([everybody, likeliest, clusters]))

    def penalty(
        self, logits: Float[Tensor, "*n K"], component: Int[Tensor, "*n"]
    ) -> Float[Tensor, "*n"]:
        """Minus the log density of logits in a component, up to a constant of all."""
        away = logits - self.means[component]
        if self.space != "linear":
            away = away - logits.mean(-1, keepdim=True)
        costs = torch.stack([0.5 * ((away @ each) * away).sum(-1) for each in self.precisions])
        cost = costs[0] if len(costs) == 1 else torch.where(component > 0, costs[1], costs[0])
        return cost - self.heights[component]


def mean_over_components(
    prior: LogitPrior,
    temperature: float,
    values: Float[Tensor, "S U"],
    order: Int[Tensor, "n U"],
    logits: Float[Tensor, "K n U"],
    evidence: Float[Tensor, "n U"],
) -> Float[Tensor, "K U"]:
    """The mean point of each user over the components of a prior with clusters, as logits.

    Of components that were followed, the best lane; of clusters that were not, the cluster's mean, whose value there
    is taken to be as far from its evidence as those of the lanes that were followed are, on the mean. A user whose
    objective is no number gets the prior's mean: comparisons whose features are no numbers say nothing.

    Args:
        prior: whose `starts` these are.
        temperature: tau of points.
        values: objective at each start; inf where it is no number.
        order: which n starts were followed.
        logits: where that ended.
        evidence: log evidence of the component of each, there.
    """
    starts = prior.starts
    mine = starts.component[order]
    begun = -values.gather(0, order)
    gain = (evidence - begun).mean(0)
    evidence = without_repetition(evidence, mine)
    num_clusters = prior.num_components - 1
    rest = gain - values[-num_clusters:]
    followed = torch.zeros(num_clusters + 1, rest.shape[1], dtype=torch.bool, device=rest.device)
    followed.scatter_(0, mine, True)
    rest = torch.where(followed[1:], -torch.inf, rest)
    clusters = starts.points[-num_clusters:].T[:, :, None].expand(-1, -1, rest.shape[1])
    candidates = torch.cat([logits, clusters], 1).transpose(0, 1)
    log_evidence = torch.cat([evidence, rest]).nan_to_num(nan=torch.finfo(rest.dtype).min)
    logits = posterior_mean(candidates, log_evidence, temperature, prior.space)
    return torch.where(begun.isfinite().any(0), logits, prior.mean[:, None])


def posterior_mean(
    logits: Float[Tensor, "n K *U"],
    log_evidence: Float[Tensor, "n *U"],
    temperature: float,
    space: PointSpace = "simplex",
) -> Float[Tensor, "K *U"]:
    """Logits of the mean point of n candidates for each user, weighted by their evidence; centred for a mixture."""
    weight = torch.softmax(log_evidence, 0).unsqueeze(1)
    if space != "simplex":
        return (weight * logits).sum(0)
    mixture = (weight * point_of(logits, space, temperature, 1)).sum(0)
    logits = temperature * mixture.clamp(min=torch.finfo(mixture.dtype).tiny).log()
    return logits - logits.mean(0, keepdim=True)


def without_repetition(
    log_evidence: Float[Tensor, "n U"], component: Int[Tensor, "n U"]
) -> Float[Tensor, "n U"]:
    """-inf for all but the best candidate of each component, the first of equals: two may be the same optimum."""
    distinct = log_evidence.clone()
    for second in range(1, len(distinct)):
        for first in range(second):
            same, worse = component[first] == component[second], distinct[first] < distinct[second]
            distinct[first] = torch.where(same & worse, -torch.inf, distinct[first])
            distinct[second] = torch.where(same & ~worse, -torch.inf, distinct[second])
    return distinct
