"""The prior of `adapt` and `few_shot`: what the run's own users say of a new one."""

import logging
from dataclasses import replace

import numpy as np
import torch

from pal_ds.adaptation.blocks import UserComparisons
from pal_ds.adaptation.directions import DirectionPrior, Terms, learn_prior, terms_by_user
from pal_ds.adaptation.fit import UserPrior, pairs_per_chunk
from pal_ds.adaptation.new_users import few_per_user
from pal_ds.adaptation.objective import shape_of
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.inference.load_run import OpenRun
from pal_ds.inference.mixtures import user_mixtures
from pal_ds.inference.readers import Reader, reader_of
from pal_ds.users.ids import generic_row_of

logger = logging.getLogger(__name__)

MAX_DRAWS = 128
"""Draws of comparisons by which a prior is chosen, each of one user: of few users each has several, none twice."""
COMPARISONS_PER_DRAW = 16
"""As few as new users may have: the prior is there for them."""


def prior_of(restored: OpenRun, world: World) -> UserPrior:
    """Return the density of new users that a run's own users speak for (empirical Bayes).

    Over logits it comes from the table alone. Where new users have a direction of their own, some of the run's
    comparisons are read, too: those of `dev`, as the directions explain those of `train` better than any others. Every
    rank of `world` calls this and gets the same.

    Raises:
        UserError: such a run whose data have no comparisons of its users.
    """
    return replace(_of_points(restored, world), reliability_variance=restored.reliability_variance)


def _of_points(restored: OpenRun, world: World) -> UserPrior:
    head = restored.model.head
    if "logits" not in head.needs:
        # Nobody's logits are fitted, or read.
        size = head.num_prototypes
        return LogitPrior.gaussian(torch.zeros(size), torch.eye(size), head.space)
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
    rows = _comparisons_of_known(data, "dev", table_rows)
    if len(rows) == 0:
        logger.warning(
            "%s: no comparisons in `dev`; the prior of new users is learnt from `train`, whose comparisons the run "
            "knows too well: new users will be fitted too boldly",
            data.path,
        )
        rows = _comparisons_of_known(data, "train", table_rows)
    if len(rows) == 0:
        raise UserError(
            f"{data.path}: no comparison of the run's users is left, from which the prior of new users with a "
            "direction of their own (mixture: free) is learnt. Restore the data, or train with mixture: signed."
        )
    rows, draw, user_of_draw = _draws(data, rows)
    reader = reader_of(restored, data, rows, table_rows, world, encode_ahead=True)
    owner = torch.from_numpy(table_rows[user_of_draw])
    users = restored.users
    factor = users.log_reliability[owner].exp() if users.has_reliability else None
    terms = _terms(restored, reader, rows, draw, factor)
    points = user_mixtures(head, restored.users)[:-1]
    if (generic := generic_row_of(restored.users.ids)) >= 0:
        # Nobody's taste, and in the way of nobody: those behind it move up.
        points = torch.cat([points[:generic], points[generic + 1 :]])
        owner = owner - (owner > generic).long()
    threshold = None if restored.model.tie_threshold is None else restored.model.tie_threshold()
    shape = shape_of(loss, None if threshold is None else threshold.detach())
    return learn_prior(head, points, terms, owner, shape)


def _comparisons_of_known(data: PreparedData, split: str, table_rows: np.ndarray) -> np.ndarray:
    """Rows of a split whose users the run knows."""
    rows = data.rows(split)
    return rows[table_rows[data.comparisons["user"][rows]] >= 0]


def _draws(data: PreparedData, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(some of the comparisons, the draw of each, the user of each draw); a user's are dealt to their draws in turn."""
    owners = np.unique(data.comparisons["user"][rows])
    chosen = owners[np.linspace(0, len(owners) - 1, min(len(owners), MAX_DRAWS)).astype(int)]
    rows = rows[np.isin(data.comparisons["user"][rows], chosen)]
    most = COMPARISONS_PER_DRAW * max(1, MAX_DRAWS // len(chosen))
    rows = few_per_user(data, rows, most, seed=0)
    rows = rows[np.argsort(data.comparisons["user"][rows], kind="stable")]
    user, count = np.unique(data.comparisons["user"][rows], return_counts=True)
    num_draws = np.maximum(1, count // COMPARISONS_PER_DRAW)
    first = np.cumsum(num_draws) - num_draws
    place = np.arange(len(rows)) - np.repeat(np.cumsum(count) - count, count)
    draw = np.repeat(first, count) + place % np.repeat(num_draws, count)
    return rows, draw, np.repeat(user, num_draws)


def _terms(
    restored: OpenRun,
    reader: Reader,
    rows: np.ndarray,
    draw_of: np.ndarray,
    factor: Float[torch.Tensor, "n"] | None,
) -> list[Terms]:
    """Comparisons `rows` by draw, read in chunks of whole draws; `factor` is that of each draw's margins."""
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
            own_factor = None if factor is None else factor[begin : begin + per_chunk].to(device)
            comparisons = UserComparisons(owner, batch.facts(), threshold, own_factor)
            parts = terms_by_user(head, features, comparisons, per_chunk, restored.config.loss)
            terms += [part._replace(users=part.users + begin) for part in parts]
    return terms
