"""The user table that a training starts with: who is in it, and who stands for everybody else."""

from dataclasses import replace

import numpy as np

from pal_ds.config.run_config import RunConfig
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.heads.base import Head
from pal_ds.users import Shard, TrainedUsers, trained_users
from pal_ds.users.ids import POPULATION_USER, UserIds, generic_row_of


def ids_of_table(config: RunConfig, data: PreparedData) -> UserIds:
    """Return the ids that have a row, in order: the users who may be trained on, and behind them the generic one.

    The latter where a share of the training is asked for this user, who may be among the former.
    """
    ids = UserIds.of(data.users).take(np.flatnonzero(data.user_seen))
    if config.users.generic_fraction > 0 and POPULATION_USER not in ids:
        ids = ids.joined(UserIds.of([POPULATION_USER]))
    return ids


def seen_users(
    config: RunConfig, data: PreparedData, head: Head, world: World
) -> tuple[TrainedUsers, np.ndarray, int]:
    """Return (fresh table of the users to train on, each data user's row in it (-1: held out), the generic user's row).

    The generic user is the one whom records without a user id name.
    """
    ids, users = ids_of_table(config, data), config.users
    table_rows = np.where(data.user_seen, np.cumsum(data.user_seen) - 1, -1)
    if "logits" not in head.needs:
        # Nobody trains these: they stand for users of whom nothing is known.
        users = replace(users, init_std=0.0)
    shard = Shard(world.rank, world.world_size, world.sum_integers)
    settings = (users, config.train.seed, world.device, shard)
    table = trained_users(head.num_prototypes, ids, *settings)
    return table, table_rows.astype(np.int64), generic_row_of(ids)
