"""What the run's own users say of a new one: the prior of `adapt` and `few_shot`."""

import logging

import numpy as np
import torch

from pal_ds.adaptation.blocks import UserComparisons
from pal_ds.adaptation.directions import DirectionPrior, Terms, learn_prior, terms_by_user
from pal_ds.adaptation.fit import UserPrior, pairs_per_chunk
from pal_ds.adaptation.new_users import few_per_user
from pal_ds.adaptation.objective import shape_of
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.inference.load_run import OpenRun
from pal_ds.inference.mixtures import user_mixtures
from pal_ds.inference.readers import Reader, reader_of
from pal_ds.users.ids import generic_row_of

logger = logging.getLogger(__name__)

NUM_DRAWS = 64
"""Draws of comparisons by which a prior is chosen, each of one user: of few users each has several."""
COMPARISONS_PER_DRAW = 48


def prior_of(restored: OpenRun, world: World) -> UserPrior:
    """Return the density of new users that a run's own users speak for (empirical Bayes).

    Over logits it comes from the table alone. Where new users have a direction of their own, some of the run's training
    comparisons are read, too; every rank of `world` calls this and gets the same.

    Raises:
        UserError: such a run whose data have no training comparisons.
    """
    head = restored.model.head
    if not head.residual_size:
        prior = LogitPrior.of(restored.users, head.space)
        if prior.num_components > 1:
            logger.info("prior: the run's users fall into %d clusters", prior.num_components - 1)
        return prior
    learnt = _learn(restored, world)
    prior = world.from_rank_zero(lambda: learnt)
    logger.info(
        "prior of new users: standard deviation %.3g of each number of their own direction",
        prior.residual_variance**0.5,
    )
    return prior


def _learn(restored: OpenRun, world: World) -> DirectionPrior:
    data, head, loss = restored.data, restored.model.head, restored.config.loss
    table_rows = restored.users.ids.find(data.users)
    train = data.rows("train")
    train = train[table_rows[data.comparisons["user"][train]] >= 0]
    if len(train) == 0:
        raise UserError(
            f"{data.path}: no comparison of the run's users is left in `train`, from which the prior of new users "
            "with a direction of their own (mixture: free) is learnt. Restore the data, or train with mixture: signed."
        )
    owners = np.unique(data.comparisons["user"][train])
    chosen = owners[np.linspace(0, len(owners) - 1, min(len(owners), NUM_DRAWS)).astype(int)]
    train = train[np.isin(data.comparisons["user"][train], chosen)]
    num_draws = max(1, NUM_DRAWS // len(chosen))
    drawn = [few_per_user(data, train, COMPARISONS_PER_DRAW, seed) for seed in range(num_draws)]
    rows = np.concatenate(drawn)
    number = np.concatenate([np.full(len(part), draw) for draw, part in enumerate(drawn)])
    place = np.searchsorted(chosen, data.comparisons["user"][rows])
    reader = reader_of(restored, data, rows, table_rows, world, encode_ahead=True)
    terms = _terms(restored, reader, rows, number * len(chosen) + place)
    owner = torch.from_numpy(np.tile(table_rows[chosen], num_draws))
    points = user_mixtures(head, restored.users)[:-1]
    if (generic := generic_row_of(restored.users.ids)) >= 0:
        # Nobody's taste, and in the way of nobody: those behind it move up.
        points = torch.cat([points[:generic], points[generic + 1 :]])
        owner = owner - (owner > generic).long()
    threshold = None if restored.model.tie_threshold is None else restored.model.tie_threshold()
    shape = shape_of(loss, None if threshold is None else threshold.detach())
    return learn_prior(head, points, terms, owner, shape)


def _terms(restored: OpenRun, reader: Reader, rows: np.ndarray, draw_of: np.ndarray) -> list[Terms]:
    """Comparisons `rows` by draw, read in chunks of whole draws."""
    head, model = restored.model.head.eval(), reader.model
    order = np.argsort(draw_of, kind="stable")
    device = next(head.parameters()).device
    most = pairs_per_chunk(head, reader.collator, rows)
    num_draws, terms = int(draw_of.max()) + 1, []
    per_chunk = max(1, most // COMPARISONS_PER_DRAW)
    for begin in range(0, num_draws, per_chunk):
        own = order[(draw_of[order] >= begin) & (draw_of[order] < begin + per_chunk)]
        if len(own) == 0:
            continue
        batch = reader.collator(rows[own], np.arange(len(own))).to(device)
        owner = torch.from_numpy(draw_of[own] - begin).to(device)
        with torch.no_grad():
            features = model.backbone(batch)
            threshold = None if model.tie_threshold is None else model.tie_threshold()
            comparisons = UserComparisons(owner, batch.facts(), threshold)
            parts = terms_by_user(head, features, comparisons, per_chunk, restored.config.loss)
            terms += [part._replace(users=part.users + begin) for part in parts]
    return terms
