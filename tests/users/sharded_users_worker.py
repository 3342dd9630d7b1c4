"""Ranks of test_sharded_users: tables in slices beside whole ones, alone and in trainings of a tiny run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from pal_ds.data.loader import UpdateInputs
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.engine.process_group import distributed
from pal_ds.engine.step import Stepper, UpdateStats
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training import loop
from pal_ds.training.state import Training
from pal_ds.users import (
    Shard,
    ShardedUserTable,
    StoredUsers,
    TrainedUsers,
    UsersConfig,
    UserTable,
    files,
    rows,
    trained_users,
)
from pal_ds.users.ids import UserIds
from tests import one_training
from tests.engine.guard_worker import poisoned
from tests.training.resume_worker import recipe
from tests.warm import fork_ranks, wait_for

NUM_USERS, K, NUM_UPDATES = 37, 3, 6
IDS = [f"user {row}" for row in range(NUM_USERS)]
SHARD, WHOLE = UsersConfig(shard_rows_above=0, max_row_norm=2.0), UsersConfig(max_row_norm=2.0)
POISONED = 2
"""The update of the trainings that is skipped."""


def made(config: UsersConfig, world: World) -> TrainedUsers:
    shard = Shard(world.rank, world.world_size, world.sum_integers)
    return trained_users(K, UserIds.of(IDS), config, 7, world.device, shard)


def update(table: TrainedUsers, number: int) -> torch.Tensor:
    """One update with users named several times, in no order; returns what it read."""
    draw = torch.Generator().manual_seed(number)
    # The last update names few, so that a rank has none of them.
    highest = 5 if number == NUM_UPDATES - 1 else NUM_USERS
    named = torch.randint(highest, (50,), generator=draw)
    gradients = torch.randn(50, K, generator=draw) * 10.0 ** torch.randint(
        -4, 4, (50, 1), generator=draw
    )
    leaf = table.fetch(named).leaf(named[10:30])
    assert leaf.is_leaf and leaf.requires_grad
    table.apply(named, gradients, torch.randperm(50, generator=draw), 0.05)
    return leaf.detach()


def tables(world: World, out: Path) -> None:
    """Both kinds side by side, then each goes on from what worlds of other sizes and the other kind have saved."""
    rows.BLOCK_ROWS = 8
    sharded, whole = made(SHARD, world), made(WHOLE, world)
    assert isinstance(whole, UserTable)
    assert isinstance(sharded, ShardedUserTable) == (world.world_size > 1)
    for name in ("sharded_half", "whole_half"):
        if (stored := out / name).exists():
            sharded.restore(StoredUsers(stored))
            whole.restore(StoredUsers(stored))
            run(sharded, whole, range(3, NUM_UPDATES))
            keep(out / f"{name}_then_{world.world_size}", sharded, whole, world)
    if not (out / "whole_half").exists():
        world.barrier()
        run(sharded, whole, range(3))
        keep(out / "half", sharded, whole, world)
        run(sharded, whole, range(3, NUM_UPDATES))
        keep(out / "end", sharded, whole, world)
        negative_zero(sharded, world)
        told_of_a_full_disk(sharded, out / "full", world)


def run(sharded: TrainedUsers, whole: TrainedUsers, numbers: range) -> None:
    for number in numbers:
        assert torch.equal(update(sharded, number), update(whole, number))
    # In no order, of the first slice and the last.
    named = torch.tensor([NUM_USERS - 1, 0, 17, 3])
    one, other = (table.records_of(named).records for table in (sharded, whole))
    assert torch.equal(one.view(torch.int32), other.view(torch.int32))


def keep(name: Path, sharded: TrainedUsers, whole: TrainedUsers, world: World) -> None:
    for kind, table in (("sharded", sharded), ("whole", whole)):
        table.save(name.with_name(f"{kind}_{name.name}") if world.is_rank_zero else None)
    world.barrier()


def negative_zero(sharded: TrainedUsers, world: World) -> None:
    """A sum of floats would turn -0.0 into 0.0."""
    assert isinstance(sharded, ShardedUserTable)
    sharded.own.logits.fill_(-0.0)
    named = torch.arange(NUM_USERS)
    assert torch.signbit(sharded.fetch(named).leaf(named)).all()


def told_of_a_full_disk(sharded: TrainedUsers, out: Path, world: World) -> None:
    """The rank that writes fails in the first block, and no rank is left waiting."""

    def fail(*_: object) -> tuple[bytes, dict[str, int]]:
        raise OSError(28, "No space left on device")

    header, files._header = files._header, fail
    try:
        world.on_every_rank(lambda: sharded.save(out if world.is_rank_zero else None))
    except OSError as error:
        (out.with_name(f"told_{world.rank}")).write_text(str(error))
    except Exception as error:
        (out.with_name(f"told_{world.rank}")).write_text(f"{type(error).__name__}: {error}")
    files._header = header


def training(world: World, data_path: str, base: str, out: Path, kind: str, stop: int) -> None:
    """A run whose third update is skipped, up to `stop` or on from where it is."""
    config = recipe(data_path, base, "frozen")
    users = replace(config.users, shard_rows_above=0 if kind == "sharded" else None)
    settings = replace(config.train, stop_after=stop, ds_config="tests/ds/zero2.json", save_every=1)
    config = replace(config, users=users, train=replace(settings, keep_checkpoints=10))
    make = loop.make_update

    def disturbed(state: Training, stepper: Stepper, inputs: UpdateInputs) -> UpdateStats:
        sharded = kind == "sharded" and world.world_size > 1
        assert isinstance(state.users, ShardedUserTable if sharded else UserTable)
        return make(state, stepper, poisoned(inputs, world) if state.step == POISONED else inputs)

    loop.make_update = disturbed
    try:
        one_training.train(config, RunDirectory(out), PreparedData.open(data_path), world)
    finally:
        loop.make_update = make


def trainings(world: World, data: str, base: str, out: Path) -> None:
    """Runs of both kinds; each then goes on as the other. The prior of rows is learnt before and after that."""
    loop.LEARN_EVERY = 2
    for kind, other in (("whole", "sharded"), ("sharded", "whole")):
        training(world, data, base, out / kind, kind, 5)
        training(world, data, base, out / f"{kind}_then_{other}", kind, 3)
        world.barrier()
        training(world, data, base, out / f"{kind}_then_{other}", other, 5)


def in_ranks(size: int, work: Callable[[World], None], log: Path) -> list[str]:
    def as_rank() -> None:
        with distributed() as world:
            work(world)

    codes = wait_for(fork_ranks(size, as_rank, log), seconds=240)
    said = [Path(f"{log}.{rank}").read_text() for rank in range(size)]
    return [] if codes == [0] * size else said


def every_table(out: str) -> list[str]:
    """What ranks said that failed."""
    said = [
        in_ranks(size, lambda w: tables(w, Path(out)), Path(out) / f"log_{size}")
        for size in (2, 3, 1)
    ]
    return [text for texts in said for text in texts]


def every_training(data: str, base: str, out: str) -> list[str]:
    """What ranks said that failed."""
    return in_ranks(2, lambda w: trainings(w, data, base, Path(out)), Path(out) / "log")
