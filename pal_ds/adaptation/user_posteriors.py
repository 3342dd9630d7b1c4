"""Posteriors of the users whom `fit_users` fitted, from the same comparisons."""

import torch
from torch import Tensor

from pal_ds.adaptation.blocks import UserComparisons, blocks, with_sure_labels
from pal_ds.adaptation.fit import Chunk, UserPairs, chunks_of
from pal_ds.adaptation.gradient import losses_of, margins_of
from pal_ds.adaptation.likelihoods import ByLosses, ByStatistics
from pal_ds.adaptation.objective import shape_of
from pal_ds.adaptation.posterior import Posterior, Simplex, posterior_of, users_at_once
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.data.collator import Collator
from pal_ds.distributed import phase
from pal_ds.errors import UserError
from pal_ds.heads.base import Head
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.heads.sufficient_statistics import MixtureStatistics
from pal_ds.losses import PreferenceLoss
from pal_ds.model import RewardModel


def refuse_no_posterior(head: Head, loss: PreferenceLoss) -> None:
    """Raise UserError for a head or a loss whose users have no posterior: nothing is fitted, or no likelihood is."""
    if "logits" not in head.needs:
        raise UserError(
            "--posterior: this run's head makes users' points from their comparisons or groups; no posterior of "
            "fitted points exists. Leave --posterior out."
        )
    if loss.kind != "logistic":
        raise UserError(
            f"--posterior: the loss of this run is {loss.kind!r}, whose margins are no log-odds, so that comparisons "
            "have no likelihood. Train with loss.kind: logistic, or leave --posterior out."
        )


def posterior_of_users(
    model: RewardModel,
    collator: Collator,
    pairs: UserPairs,
    fitted: Float[Tensor, "U K"],
    *,
    loss: PreferenceLoss,
    prior: LogitPrior,
) -> Posterior:
    """The posterior of every user of `pairs`, on the CPU; that of a user without comparisons is the prior.

    Args:
        model: the run's model.
        collator: reads the comparisons.
        pairs: what the users were fitted from.
        fitted: the logits that `fit_users` gave them, fp32.
        loss: the run's loss.
        prior: the prior of the fit.

    Raises:
        UserError: see `refuse_no_posterior`.
    """
    refuse_no_posterior(model.head, loss)
    device = next(model.head.parameters()).device
    prior = prior.to(device)
    coordinates = Simplex(model.head.temperature)
    unknown = posterior_of(_Nothing(), prior.mean[None], prior, coordinates)
    whole = Posterior(
        *(part.cpu().repeat(pairs.num_users, *[1] * (part.ndim - 1)) for part in unknown)
    )
    for users, chunk in chunks_of(model, collator, pairs):
        own = fitted[users].to(device)
        for part, posterior in _of_chunk(chunk, own, loss, prior):
            for all_users, some in zip(whole, posterior, strict=True):
                all_users[users[part.cpu()]] = some.cpu()
    return whole


class _Nothing:
    """The likelihood of a user without comparisons."""

    def log_value(
        self, fitted: Float[Tensor, "U M K"], point: Float[Tensor, "U M K"]
    ) -> Float[Tensor, "U M"]:
        return fitted.new_zeros(fitted.shape[:2])

    def curvature(self, fitted: Float[Tensor, "U K"]) -> Float[Tensor, "U K K"]:
        return fitted.new_zeros(*fitted.shape, fitted.shape[1])


def _of_chunk(
    chunk: Chunk, fitted: Float[Tensor, "U K"], loss: PreferenceLoss, prior: LogitPrior
) -> list[tuple[Tensor, Posterior]]:
    """(users, their posterior), together all of the chunk's."""
    with torch.no_grad():
        statistics = chunk.head.statistics(chunk.features)
    comparisons = UserComparisons(chunk.owner, chunk.batch.facts(), chunk.threshold)
    if statistics is None:
        margins = margins_of(chunk.head, chunk.features, None, chunk.owner)
        likelihood = ByLosses(losses_of(margins, loss, comparisons), chunk.owner)
        everyone = torch.arange(chunk.num_users, device=fitted.device)
        coordinates = Simplex(chunk.head.temperature)
        return [(everyone, posterior_of(likelihood, fitted, prior, coordinates))]
    return posteriors_by_statistics(statistics, comparisons, fitted, prior, loss)


@torch.no_grad()
def posteriors_by_statistics(
    statistics: MixtureStatistics,
    comparisons: UserComparisons,
    fitted: Float[Tensor, "U K"],
    prior: LogitPrior,
    loss: PreferenceLoss,
) -> list[tuple[Tensor, Posterior]]:
    """(users int64 [u], their posterior): together all who have comparisons, as rows of `fitted`."""
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
