"""Users' points from their comparisons, for heads that read those in place of a row of the user table.

In a training the engine's forward makes them (its parameters may be partitioned), elsewhere the head by itself.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.batch import Batch
from pal_ds.data.collator import Collator
from pal_ds.distributed import phase
from pal_ds.distributed.world import World
from pal_ds.heads.base import Head, HeadOutput, UserState
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.model import RewardModel, user_state
from pal_ds.users.ids import UserIds

PAIRS_PER_FORWARD = 2**12


def pairs_per_forward(head: Head, collator: Collator, micro_batch_pairs: int) -> int:
    """Number of comparisons that have room at once: where the backbone runs for them, those of a training's forward."""
    return PAIRS_PER_FORWARD if collator.stored else micro_batch_pairs * (1 + head.num_context)


class ScoreUsers(Protocol):
    """A reward model, or an engine around one, as a function."""

    def __call__(self, batch: Batch, state: UserState, /) -> HeadOutput: ...


def points_in_training(
    engine: ScoreUsers,
    head: Head,
    collator: Collator,
    scored: Collator,
    users: np.ndarray,
    world: World,
    most_pairs: int = PAIRS_PER_FORWARD,
) -> Float[Tensor, "n K"]:
    """Points of these users from `num_context_scored` comparisons of each; equal on every rank.

    `users` are codes of the data that `asked` reads; the comparisons are those of `collator`, the run's own. A forward
    reads `most_pairs` of them, or those of one user where that is more.
    """
    assert collator.contexts is not None, "a head that reads contexts came without"
    if scored.data is not collator.data:
        names = UserIds.of(scored.data.users).take(users)
        users = UserIds.of(collator.data.users).find(names)
    num_context = head.num_context_scored
    share = max(1, most_pairs // num_context)
    points = [torch.empty(0, head.num_prototypes, device=world.device)]
    with torch.no_grad():
        for begin in range(0, len(users), share * world.world_size):
            phase.enter("evaluate")
            first = begin + world.rank * share
            own = users[first : first + share]
            # A rank without users of its own takes part all the same.
            context = collator.contexts.known(own if len(own) else users[:1], num_context)
            batch = collator(context[0][:, 0], np.arange(len(context[0])), context=context)
            batch = batch.to(world.device)
            own_points = engine(batch, user_state(batch)).point
            assert own_points is not None, "a head that reads contexts gave no points"
            padded = own_points.new_zeros(share, own_points.shape[1])
            padded[: len(own)] = own_points[: len(own)]
            points.append(world.all_gather(padded).flatten(0, 1))
    return torch.cat(points)[: len(users)]


def encode_users(
    model: RewardModel,
    collator: Collator,
    rows: np.ndarray,
    user_index: np.ndarray,
    num_users: int,
    device: torch.device,
    *,
    flipped: bool = False,
) -> Float[Tensor, "U K"]:
    """Points of users 0..num_users-1 from all of the comparisons `rows`, of which `user_index` says whose each is.

    Of a user without comparisons: what the head makes of none. `flipped`: as if each had gone the other way.
    """
    context, length = _by_user(rows, user_index, num_users)
    share = max(1, PAIRS_PER_FORWARD // max(1, context.shape[1]))
    model.head.eval()
    points = [torch.empty(0, model.head.num_prototypes)]
    with torch.no_grad():
        for begin in range(0, num_users, share):
            part = slice(begin, begin + share)
            chosen = context[part], length[part]
            batch = collator(chosen[0][:, 0], np.arange(len(chosen[0])), context=chosen).to(device)
            if flipped and batch.context is not None:
                batch = batch._replace(context=batch.context.flip(2))
            points.append(model.head.encode(model.backbone(batch), user_state(batch)).cpu())
    return torch.cat(points)


def _by_user(
    rows: np.ndarray, user_index: np.ndarray, num_users: int
) -> tuple[np.ndarray, np.ndarray]:
    """(comparisons int64 [U, N] of each user, the rest filled up with the first of all; how many count [U])."""
    length = np.bincount(user_index, minlength=num_users)
    order = np.argsort(user_index, kind="stable")
    place = np.arange(len(rows)) - np.repeat(np.cumsum(length) - length, length)
    context = np.full((num_users, max(1, int(length.max(initial=0)))), rows[0] if len(rows) else 0)
    context[user_index[order], place] = rows[order]
    return context, length


__all__ = ["encode_users", "pairs_per_forward", "points_in_training"]
