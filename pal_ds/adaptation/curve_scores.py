"""Test pairs of a few-shot curve, scored for users who are fitted from each draw of their comparisons."""

import numpy as np
import torch
import xxhash
from torch import Tensor

from pal_ds.adaptation.active import NewUsersPool
from pal_ds.adaptation.fit import UserPairs, fit_users, pairs_per_chunk
from pal_ds.adaptation.run_users import prior_of
from pal_ds.distributed.world import World
from pal_ds.eval.figures import scored_pairs
from pal_ds.heads.base import UserState
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.inference.load_run import OpenRun
from pal_ds.inference.mixtures import user_mixtures, widened
from pal_ds.inference.readers import Reader
from pal_ds.inference.scoring import Forwards
from pal_ds.progress import progress_bar


def right_of_draws(
    pool: NewUsersPool, test_rows: np.ndarray, drawn: list[np.ndarray], world: World
) -> np.ndarray:
    """`metrics.correctness` of the test pairs after the users of the pool are fitted to each draw, fp64 [draws, n]."""
    restored, reader, num_users = pool.restored, pool.reader, pool.num_users
    user_of = reader.collator.user_rows
    head = restored.model.head
    population = widened(user_mixtures(head, restored.users)[-1:], head)
    prior = prior_of(restored, world)
    # Each (k, seed, user) is fitted as a user of its own, all of them in one go.
    rows = np.concatenate(drawn)
    owner = np.concatenate([draw * num_users + user_of(part) for draw, part in enumerate(drawn)])
    mixtures = population.repeat(len(drawn) * num_users, 1)
    if restored.model.head.has_points and len(rows):
        pairs, loss = UserPairs(rows, owner, len(mixtures)), restored.config.loss
        logits = fit_users(
            reader.model, reader.collator, pairs, loss=loss, prior=prior, solver=pool.solver
        ).logits
        fitted = np.unique(owner)
        restored.model.head.eval()
        mixtures[fitted] = restored.model.head.mixture_weights(UserState(logits[fitted]))
    # Each rank fitted them, and which draws are alike decides which are scored, together: to the bit or not at all.
    mixtures = world.from_rank_zero(lambda: mixtures)
    return _right(restored, reader, test_rows, mixtures.split(num_users), population, world)


def _right(
    restored: OpenRun,
    reader: Reader,
    rows: np.ndarray,
    per_draw: tuple[Float[Tensor, "U K"], ...],
    population: Float[Tensor, "one K"],
    world: World,
) -> np.ndarray:
    """`metrics.correctness` of the test pairs under the mixtures of each draw, fp64 [draws, n]."""
    correct = np.empty((len(per_draw), len(rows)))
    num_pairs = pairs_per_chunk(restored.model.head, reader.collator, rows)
    forwards = Forwards(reader.model, reader.collator, num_pairs, world)
    scored: dict[bytes, np.ndarray] = {}
    # Where users are their groups, a comparison's own is known, of whomever it is.
    by_group = "group" in restored.model.head.needs
    with progress_bar("testing new users", len(per_draw), shown=True, unit="pairs") as advance:
        for index, mixtures in enumerate(per_draw):
            of_draw = torch.cat([mixtures, population])
            # Without comparisons, or without users, all draws are alike.
            key = xxhash.xxh3_128_digest(of_draw.cpu().numpy().tobytes())
            if key not in scored:
                points = None if by_group else of_draw.to(world.device)
                margins = forwards.margins(rows, points)
                scored[key] = scored_pairs(restored.data, rows, margins).right
            correct[index] = scored[key]
            advance(len(rows))
    return correct
