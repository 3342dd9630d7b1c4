"""Mixtures of the users whose comparisons are scored: from the user table, or from the comparisons that a head reads.

In a training the engine's forward makes the latter (its parameters may be partitioned), elsewhere the head by itself.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.collator import Collator
from pal_ds.data.tables import preferences
from pal_ds.distributed import phase
from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.forget import finish_interrupted_removal
from pal_ds.engine.checkpoint.verify import refuse_strangers_run
from pal_ds.heads.base import Head, UserState
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.inference.load_run import open_run, trained_head
from pal_ds.inference.scoring import Forward
from pal_ds.model import RewardModel, user_state
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import TrainedUsers, UserTable
from pal_ds.users.config import Scalar
from pal_ds.users.ids import UserIds, generic_row_of
from pal_ds.users.rows import blocks

PAIRS_PER_FORWARD = 2**12


def user_mixtures(head: Head, users: UserTable) -> Float[Tensor, "U+1 K"]:
    """Each user's mixture as the head uses it in evaluation, and as the last row that of who is not in the table.

    That is the mixture of the generic user where the table holds one, else the mean of all.
    """
    head.eval()
    with torch.no_grad():
        mixtures = head.mixture_weights(UserState(users.logits))
    return torch.cat([mixtures, population_mixture(mixtures, generic_row_of(users.ids))])


def log_scalar_of(users: UserTable, name: Scalar) -> Float[Tensor, "U+1"] | None:
    """The logarithm of a scalar of each user, and as the last that of who is not in the table.

    The latter is the generic user's, else 0. None for a table without it.
    """
    if name not in users.scalars:
        return None
    own, row = getattr(users, f"log_{name}"), generic_row_of(users.ids)
    return torch.cat([own, own[row : row + 1] if row >= 0 else own.new_zeros(1)])


def widened(points: Float[Tensor, "n K"], head: Head) -> Float[Tensor, "n K+d"]:
    """Return the users as points of K + `residual_size` numbers: who has no direction of their own has zeros there."""
    missing = head.num_prototypes + head.residual_size - points.shape[1]
    return torch.nn.functional.pad(points, (0, max(0, missing)))


@dataclass(frozen=True)
class MixtureSource:
    """Source of the users' mixtures for an evaluation during training."""

    forward: Forward
    """Makes the points of a head that reads users' comparisons."""
    head: Head
    users: TrainedUsers
    world: World
    own: Collator | None = None
    """Reads the run's own data; None where the scored comparisons are of these data."""
    micro_batch_pairs: int = 1
    """Comparisons that a forward of the training holds."""


class ScoredUsers(NamedTuple):
    """Users of some comparisons, and a collator that numbers them as these rows."""

    collator: Collator
    mixtures: Float[Tensor, "u+1 K"] | None
    """The last is the population's. None where users are their groups."""
    log_reliability: Float[Tensor, "u+1"] | None
    """r_u, where the table has it; the last is 0, or the generic user's."""


def with_mixtures(source: MixtureSource, collator: Collator, rows: np.ndarray) -> ScoredUsers:
    """Take the mixtures of the users whom the comparisons `rows` name.

    That of the population is taken over the table block by block where someone is unknown.
    """
    forward, head, users, world = source.forward, source.head, source.users, source.world
    by_group = "group" in head.needs
    if by_group and not users.has_reliability:
        return ScoredUsers(collator, None, None)
    owners, first = np.unique(collator.user_rows(rows), return_index=True)
    user_codes = collator.data.comparisons["user"][rows]
    known, codes = owners[owners >= 0], user_codes[first][owners >= 0]
    places = np.full(len(collator.data.users), -1, np.int64)
    places[user_codes] = np.searchsorted(known, collator.user_rows(rows))
    places[user_codes[collator.user_rows(rows) < 0]] = -1
    numbered = replace(collator, table_rows=places)
    log_reliability = _log_reliability_of_rows(users, known, collator.generic_row)
    if by_group:
        return ScoredUsers(numbered, None, log_reliability)
    head.eval()
    mixtures = _mixtures_of(head, users, torch.from_numpy(known))
    if "context" in head.needs:
        own = source.own or collator
        most_pairs = pairs_per_forward(head, own, source.micro_batch_pairs)
        mixtures = points_in_training(forward, head, own, collator, codes, world, most_pairs)
    population = mixtures.new_full((1, mixtures.shape[1]), torch.nan)
    if collator.generic_row >= 0:
        population = _mixtures_of(head, users, torch.tensor([collator.generic_row]))
    elif len(known) < len(owners):
        sums = [
            _mixtures_of(head, users, torch.arange(*block)).double().sum(0, keepdim=True)
            for block in blocks(len(users))
        ]
        population = (
            (torch.stack(sums).sum(0) / len(users)).float()
            if sums
            else population_mixture(mixtures)
        )
    return ScoredUsers(numbered, torch.cat([mixtures, population]), log_reliability)


def _mixtures_of(head: Head, users: TrainedUsers, rows: Tensor) -> Float[Tensor, "n K"]:
    with torch.no_grad():
        return head.mixture_weights(UserState(_values_of(users, rows)[:, : head.num_prototypes]))


def _log_reliability_of_rows(
    users: TrainedUsers, rows: np.ndarray, generic_row: int
) -> Float[Tensor, "n+1"] | None:
    """r_u of these rows, and as the last that of a stranger."""
    if not users.has_reliability:
        return None
    place = users.place_of("reliability")
    own = _values_of(users, torch.from_numpy(rows))[:, place]
    if generic_row < 0:
        return torch.cat([own, own.new_zeros(1)])
    return torch.cat([own, _values_of(users, torch.tensor([generic_row]))[:, place]])


def _values_of(users: TrainedUsers, rows: Tensor) -> Float[Tensor, "n V"]:
    return users.fetch(rows).leaf(rows.to(users.device)).detach()


def population_mixture(
    mixtures: Float[Tensor, "U K"], generic_row: int = -1
) -> Float[Tensor, "1 K"]:
    """s_u of the generic user, else its mean over the users of a table; the simplex's centre where there are none."""
    num_users, num_prototypes = mixtures.shape
    if generic_row >= 0:
        return mixtures[generic_row : generic_row + 1]
    if num_users == 0:
        return mixtures.new_full((1, num_prototypes), 1.0 / num_prototypes)
    return mixtures.mean(0, keepdim=True)


def pairs_per_forward(head: Head, collator: Collator, micro_batch_pairs: int) -> int:
    """Number of comparisons that have room at once: where the backbone runs for them, those of a training's forward."""
    return PAIRS_PER_FORWARD if collator.stored else micro_batch_pairs * (1 + head.num_context)


def points_in_training(
    engine: Forward,
    head: Head,
    collator: Collator,
    scored: Collator,
    users: np.ndarray,
    world: World,
    most_pairs: int = PAIRS_PER_FORWARD,
) -> Float[Tensor, "n K"]:
    """Points of these users from `num_context_scored` comparisons of each; equal on every rank.

    `users` are codes of the data that `scored` reads; the comparisons are those of `collator`, the run's own. A forward
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
    # A tie says nothing of what is preferred.
    is_sure = preferences(collator.data.comparisons[rows]) != 0
    context, length = _by_user(rows[is_sure], user_index[is_sure], num_users)
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


class UserLine(TypedDict):
    """A user in a listing."""

    user_id: str
    mixture: list[float] | None
    """As the head uses it in evaluation; None where the table tells nothing of users' points: the head knows them by
    comparisons or groups."""
    reliability: NotRequired[float]
    """The factor of the user's margins, exp(r_u), where the run's users have one; rewards are not multiplied by it."""
    tie_threshold: NotRequired[float]
    """The factor of the run's threshold of ties for this user, exp(q_u), where the run's users have one."""


def user_lines(head: Head, users: UserTable) -> list[UserLine]:
    """The users of a table that holds their points, in order."""
    mixtures = user_mixtures(head, users)[:-1].tolist()
    lines: list[UserLine] = [
        {"user_id": user_id, "mixture": mixture}
        for user_id, mixture in zip(users.ids, mixtures, strict=True)
    ]
    for name in users.scalars:
        factors = getattr(users, f"log_{name}").exp().tolist()
        for line, factor in zip(lines, factors, strict=True):
            line[name] = factor
    return lines


def list_users(
    run: RunDirectory, step: str = "latest", *, trust: bool = False, trust_code: bool = False
) -> list[UserLine]:
    """Every user of a checkpoint.

    Raises:
        UserError: the run or its data cannot be opened.
    """
    run.require_run()
    if not trust:
        # Before anything of it is moved.
        refuse_strangers_run(run)
    finish_interrupted_removal(run)
    opened = open_run(run, step, trust=trust, trust_code=trust_code)
    head = trained_head(opened)
    lines = user_lines(head, opened.users)
    if head.is_personal and "logits" not in head.needs:
        for line in lines:
            line["mixture"] = None
    return lines
