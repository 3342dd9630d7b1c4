"""Readers of comparisons of any data for a run, and the users of these data that it knows."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pal_ds.backbones.given import GivenStates
from pal_ds.config.run_config import TrainConfig
from pal_ds.data.collator import Collator
from pal_ds.data.tables import PreparedData, group_codes
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.feature_cache.encode import encode_once
from pal_ds.feature_cache.folders import restored_cache_folders
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.inference.load_run import OpenRun
from pal_ds.inference.mixtures import encode_users, log_scalar_of, user_mixtures, widened
from pal_ds.inference.scoring import Forwards
from pal_ds.model import RewardModel
from pal_ds.users import UserTable
from pal_ds.users.config import SCALARS
from pal_ds.users.ids import UserIds, generic_row_of


@dataclass(frozen=True)
class Reader:
    """Parts that score comparisons of some data for a run: its collator, and the module that takes the batches."""

    collator: Collator
    model: RewardModel
    train: TrainConfig

    def forwards(self, world: World, label: str | None = None) -> Forwards:
        """Forwards of the size that the run's own updates had."""
        train = self.train
        return Forwards(
            forward=self.model,
            collator=self.collator,
            micro_batch_pairs=train.micro_batch_pairs,
            world=world,
            micro_batch_tokens=train.micro_batch_tokens,
            label=label,
        )


def reader_of(
    restored: OpenRun,
    data: PreparedData,
    rows: np.ndarray,
    table_rows: np.ndarray,
    world: World,
    *,
    encode_ahead: bool = False,
) -> Reader:
    """Reads comparisons `rows` of `data` as the run read its own.

    `table_rows` maps users of the data to user table rows. Each distinct text is encoded once, ahead, where the
    backbone is frozen or the caller is going to score the same texts many times.
    """
    parts = restored.parts
    collator = replace(
        parts.collator,
        data=data,
        table_rows=table_rows,
        group_codes=group_codes(restored.data, data),
    )
    if parts.backbone is None or not (parts.needs_store or encode_ahead):
        return Reader(collator, restored.model, restored.config.train)
    model, config = restored.model, restored.config
    caches = None
    if parts.needs_store:
        weights = restored.manifest["base_weights"]
        caches = world.from_rank_zero(
            lambda: restored_cache_folders(parts, collator, config, weights, "fp32")
        )
    batch_texts = config.backbone.encode_batch_texts
    collator = encode_once(lambda: model.backbone, collator, rows, batch_texts, world, caches)
    return Reader(
        collator,
        RewardModel(GivenStates(), model.head, tie_threshold=model.tie_threshold),
        config.train,
    )


@dataclass(frozen=True)
class KnownUsers:
    """Users whom a run can score: its own and, if given, adapted ones; an adapted user hides a trained one."""

    ids: list[UserIds]
    """Ids of each table, whose rows follow each other in `mixtures`; the last table that holds a user decides."""
    mixtures: Float[Tensor, "U+1 K"] | None
    """Mixtures by row; the last is that of strangers: the user `population` of the adapted table where it has one, else
    the population of the run's own users. None where users are their groups."""

    log_reliability: Float[Tensor, "U+1"] | None = None
    """r_u by row, where the run's users have it; the last is of strangers."""

    log_tie_threshold: Float[Tensor, "U+1"] | None = None
    """q_u by row, likewise."""

    encoded: Float[Tensor, "n K"] | None = None
    """Points that were made from comparisons, of the run's users who are asked for."""
    encoded_rows: np.ndarray | None = None
    """Users of these points, as rows of `mixtures`."""

    @property
    def own(self) -> Float[Tensor, "U K"] | None:
        """Mixtures of the run's own users."""
        return None if self.mixtures is None else self.mixtures[: len(self.ids[0])]

    def table_rows(self, data: PreparedData) -> np.ndarray:
        """Row of each user of `data`, -1 for strangers."""
        rows, first = np.full(len(data.users), -1, np.int64), 0
        for ids in self.ids:
            of_table = ids.find(data.users)
            rows, first = np.where(of_table < 0, rows, of_table + first), first + len(ids)
        return rows


def known_users(restored: OpenRun, adapted: Path | None) -> KnownUsers:
    """The users of a run and of an adapted table. Raises UserError where the tables do not fit together."""
    head = restored.model.head
    of_scalars: dict[str, Any] = {
        f"log_{name}": log_scalar_of(restored.users, name) for name in SCALARS
    }
    if "group" in head.needs:
        if adapted is not None:
            raise UserError(
                f"--users {adapted}: this run's head asks for the group of a comparison, not for its user. Leave out "
                "--users."
            )
        return KnownUsers([restored.users.ids], None, **of_scalars)
    mixtures = user_mixtures(head, restored.users)
    if adapted is None:
        return KnownUsers([restored.users.ids], mixtures, **of_scalars)
    restored.refuse_other_table(adapted, head)
    table = UserTable.load(adapted)
    if table.num_prototypes not in head.point_sizes:
        raise UserError(
            f"--users {adapted}: {table.num_prototypes} prototypes, the run has {head.num_prototypes}. "
            "Adapt the users to this run."
        )
    adapted_mixtures = user_mixtures(head, table)
    # Whoever fitted a user of that name said what strangers are like.
    has_generic = generic_row_of(table.ids) >= 0
    stranger = adapted_mixtures if has_generic else mixtures
    parts = [mixtures[:-1], adapted_mixtures[:-1], stranger[-1:]]
    for name in restored.users.scalars:
        column = f"log_{name}"
        of_run, of_table = of_scalars[column], log_scalar_of(table, name)
        assert of_run is not None, f"the run's users have {name}"
        of_table = torch.zeros(len(table) + 1) if of_table is None else of_table
        of_stranger = of_table if has_generic else of_run
        of_scalars[column] = torch.cat([of_run[:-1], of_table[:-1], of_stranger[-1:]])
    return KnownUsers(
        [restored.users.ids, table.ids],
        torch.cat([widened(part, head) for part in parts]),
        **of_scalars,
    )


def with_points(
    known: KnownUsers, restored: OpenRun, data: PreparedData, world: World, *, flipped: bool = False
) -> KnownUsers:
    """Make points for `KnownUsers`: unchanged where the run's users have rows of their own, else for those of `data`.

    They are made from what the run's train split tells of each, as many comparisons as in the run's own evaluations;
    `flipped`, from the opposite of each.
    """
    contexts, head = restored.parts.collator.contexts, restored.model.head
    if contexts is None or known.mixtures is None:
        return known
    own = UserIds.of(contexts.data.users)
    own_rows = own.find(data.users)
    codes = np.unique(own_rows[own_rows >= 0])
    rows = restored.users.ids.find(own.take(codes))
    # Of the generic user nothing is known, whoever left comparisons without a name.
    named = (rows >= 0) & (rows != generic_row_of(restored.users.ids))
    chosen, length = contexts.known(codes[named], head.num_context_scored)
    # Who has no comparison in the train split is where the table has everybody: at the prior's mean.
    met = length > 0
    rows, chosen, length = rows[named][met], chosen[met], length[met]
    if len(rows) == 0:
        return known
    is_context = np.arange(chosen.shape[1]) < length[:, None]
    reader = reader_of(
        restored=restored,
        data=contexts.data,
        rows=np.unique(chosen),
        table_rows=np.arange(len(contexts.data.users)),
        world=world,
        encode_ahead=True,
    )
    owner = np.repeat(np.arange(len(rows)), length)
    points = encode_users(
        model=reader.model,
        collator=reader.collator,
        rows=chosen[is_context],
        user_index=owner,
        num_users=len(rows),
        device=world.device,
        flipped=flipped,
    )
    mixtures = known.mixtures.clone()
    mixtures[torch.from_numpy(rows)] = points
    return replace(known, mixtures=mixtures, encoded=points, encoded_rows=rows)


def own_margins(restored: OpenRun, rows: np.ndarray, world: World) -> Float[np.ndarray, "n"]:
    """Margins of comparisons of the run's own data for its own users, as `Forwards.margins` gives them."""
    data = restored.data
    known = with_points(known_users(restored, None), restored, data, world)
    reader = reader_of(restored, data, rows, known.table_rows(data), world)
    return reader.forwards(world).margins(rows, known.mixtures, known.log_reliability)
