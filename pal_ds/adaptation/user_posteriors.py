"""Posteriors of the users whom `fit_users` fitted, from the same comparisons."""

from typing import NamedTuple

import torch
from torch import Tensor

from pal_ds.adaptation.blocks import UserComparisons, blocks, with_sure_labels
from pal_ds.adaptation.fit import Chunk, FittedUsers, UserPairs, chunks_of
from pal_ds.adaptation.gradient import losses_of, margins_of
from pal_ds.adaptation.likelihoods import ByLosses, ByStatistics
from pal_ds.adaptation.objective import shape_of
from pal_ds.adaptation.posterior import (
    Coordinates,
    Posterior,
    Simplex,
    posterior_of,
    users_at_once,
)
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.data.collator import Collator
from pal_ds.distributed import phase
from pal_ds.heads.base import Head, UserState
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.heads.sufficient_statistics import MixtureStatistics
from pal_ds.inference.posterior_file import REACH, axes_of
from pal_ds.losses import PreferenceLoss, decision_margin
from pal_ds.model import RewardModel


class UserPosteriors(NamedTuple):
    """Posteriors of all users of a fit, on the CPU."""

    covariance: Float[Tensor, "U K K"]
    """See `posterior.Posterior`."""
    margin_std: Float[Tensor, "U"]
    """Mean standard deviation of the margins of a user's own comparisons; 0 for one without."""
    margin_std_before: Float[Tensor, "U"]
    """The same under the prior, for somebody of whom nothing is known."""


def why_no_posterior(head: Head, loss: PreferenceLoss) -> str | None:
    """The reason that a run's users have no posterior; None where they have one.

    They have one where they are fitted as points of the simplex, from comparisons with a likelihood.
    """
    if "logits" not in head.needs:
        return "its head fits no users' points"
    if not head.on_simplex:
        return "its users have weights of any sign (head.mixture signed or free), of which none is made so far"
    if loss.kind != "logistic":
        return f"its loss is {loss.kind}, under which margins are no log-odds"
    return None


def posterior_of_users(
    model: RewardModel,
    collator: Collator,
    pairs: UserPairs,
    fitted: FittedUsers,
    *,
    loss: PreferenceLoss,
    prior: LogitPrior,
) -> UserPosteriors:
    """The posterior of every user of `pairs`; that of a user without comparisons is the prior.

    Args:
        model: the run's model, for which `why_no_posterior` gives no reason.
        collator: reads the comparisons.
        pairs: what the users were fitted from.
        fitted: what `fit_users` gave them.
        loss: the run's loss.
        prior: the prior of the fit.
    """
    device = next(model.head.parameters()).device
    prior = prior.to(device)
    coordinates = Simplex(model.head.temperature)
    unknown = posterior_of(_Nothing(), prior.mean[None], prior, coordinates).covariance
    covariance = unknown.cpu().repeat(pairs.num_users, 1, 1)
    margin_std, std_before = torch.zeros(2, pairs.num_users)
    for users, chunk in chunks_of(model, collator, pairs):
        own, r = fitted.logits[users].to(device), fitted.log_reliability
        comparisons = chunk.comparisons(None if r is None else r[users].to(device))
        with torch.no_grad():
            statistics = chunk.head.statistics(chunk.features)
        if statistics is None:
            of_chunk = _by_losses(chunk, comparisons, own, loss, prior)
        else:
            # Whose comparisons all count for nothing, such as ties that the loss drops, is as unknown as without them.
            of_chunk = unknown.repeat(len(own), 1, 1)
            for some, of_some in posteriors_by_statistics(
                statistics, comparisons, own, prior, loss
            ):
                of_chunk[some] = of_some.covariance
        covariance[users] = of_chunk.cpu()
        typical = prior.mean.expand_as(own), unknown.expand_as(of_chunk)
        for place, of_whom in ((margin_std, (own, of_chunk)), (std_before, typical)):
            std = _margin_std(chunk, statistics, comparisons, *of_whom, coordinates)
            place[users] = std.cpu()
    return UserPosteriors(covariance, margin_std, std_before)


class _Nothing:
    """The likelihood of a user without comparisons."""

    def log_value(
        self, fitted: Float[Tensor, "U M K"], point: Float[Tensor, "U M K"]
    ) -> Float[Tensor, "U M"]:
        return fitted.new_zeros(fitted.shape[:2])

    def curvature(self, fitted: Float[Tensor, "U K"]) -> Float[Tensor, "U K K"]:
        return fitted.new_zeros(*fitted.shape, fitted.shape[1])


def _by_losses(
    chunk: Chunk,
    comparisons: UserComparisons,
    fitted: Float[Tensor, "U K"],
    loss: PreferenceLoss,
    prior: LogitPrior,
) -> Float[Tensor, "U K K"]:
    margins = margins_of(chunk.head, chunk.features, None, chunk.owner)
    likelihood = ByLosses(losses_of(margins, loss, comparisons), chunk.owner)
    coordinates = Simplex(chunk.head.temperature)
    return posterior_of(likelihood, fitted, prior, coordinates).covariance


@torch.no_grad()
def posteriors_by_statistics(
    statistics: MixtureStatistics,
    comparisons: UserComparisons,
    fitted: Float[Tensor, "U K"],
    prior: LogitPrior,
    loss: PreferenceLoss,
) -> list[tuple[Int[Tensor, "u"], Posterior]]:
    """Some users, as rows of `fitted`, with their posteriors; together all who have comparisons to score."""
    coordinates = Simplex(statistics.temperature)
    shape = shape_of(loss, comparisons.threshold)
    statistics, comparisons = with_sure_labels(statistics, comparisons, loss.ties)
    posteriors = []
    for block in blocks(statistics, comparisons, len(fitted), loss.token_weighting):
        sides, width, num_terms, num_users = block.linear.shape
        size = users_at_once(sides * num_terms, width)
        for lanes in torch.arange(num_users, device=fitted.device).split(size):
            phase.progress()
            part = block.take(lanes)
            likelihood = ByStatistics(part, statistics, shape, prior)
            own = fitted[part.users]
            posteriors.append((part.users, posterior_of(likelihood, own, prior, coordinates)))
    return posteriors


@torch.no_grad()
def _margin_std(
    chunk: Chunk,
    statistics: MixtureStatistics | None,
    comparisons: UserComparisons,
    fitted: Float[Tensor, "U K"],
    covariance: Float[Tensor, "U K K"],
    coordinates: Coordinates,
) -> Float[Tensor, "U"]:
    """Mean over a user's comparisons of the standard deviation of the margin that decides each."""
    owner, end, point = chunk.owner, chunk.batch.window_end, coordinates.point(fitted)

    def margin(points: Float[Tensor, "U K"]) -> Float[Tensor, "B"]:
        if statistics is None:
            user = UserState(None, None, points[owner])
            return decision_margin(chunk.head(chunk.features, user).margin, end)
        reward = statistics.reward(points[owner])
        return decision_margin(reward[:, 1] - reward[:, 0], end)

    variance = torch.zeros(len(owner), device=point.device)
    for axis in axes_of(covariance).unbind(1):
        up, down = (margin(point + reach * axis) for reach in (REACH, -REACH))
        variance += ((up - down) / (2 * REACH)).square()
    total = variance.sqrt().new_zeros(len(point)).index_add(0, owner, variance.sqrt())
    mean = total / torch.bincount(owner, minlength=len(point))
    return mean if comparisons.factor is None else comparisons.factor * mean
