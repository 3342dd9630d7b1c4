"""Worker of test_reshard: checkpoints of 1, 2 and 4 ranks, read back and trained on by other numbers of ranks.

Each world leaves what its engine held and the losses it saw; the comparisons are the test's.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pal_ds.backbones.config import BackboneConfig, LoraOptions
from pal_ds.config.run_config import OptimConfig, RunConfig, TrainConfig
from pal_ds.data.prepare import DataConfig
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.heads import PalA
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.loop import run_updates
from tests.engine.checkpoint.reshard_knots import (
    CHANGES,
    STOP,
    VARIANTS,
    held,
    knot_goes_on,
    knots_begin,
    leave_behind,
    refusals,
    save_again,
    steps_of,
)
from tests.forked import prepare_to_fork, run_world
from tests.one_training import begin

TUNINGS = ("full", "lora", "frozen", "tied")
TARGETS = {1: (2,), 2: (1, 3), 4: (2,)}
"""The world sizes that go on with a run of each world size."""


def recipe(data: str, base: str, tuning: str) -> RunConfig:
    """Two or three parameter groups, no dropout, no noise; `tied` gives a weight a second name and adds a buffer."""

    def head(hidden_size: int) -> PalA:
        made = PalA(hidden_size, num_prototypes=3)
        if tuning == "tied":
            made.alias = nn.Linear(hidden_size, hidden_size, bias=False)
            made.alias.weight = made.projector.layers[0].weight
            made.register_buffer("marks", torch.arange(3.0))
        return made

    kind = "full" if tuning == "tied" else tuning
    return RunConfig(
        data=DataConfig(path=data, source=None),
        head=head,
        backbone=BackboneConfig(path=base, tuning=kind, lora=LoraOptions(rank=4, dropout=0.0)),
        # A large epsilon: with the usual one Adam turns rounding of tiny gradients into visible steps.
        optim=OptimConfig(
            learning_rate=3e-3,
            backbone_learning_rate=1e-3,
            prototype_learning_rate=2e-3,
            epsilon=1e-4,
        ),
        train=TrainConfig(
            batch_pairs=8,
            micro_batch_pairs=4,
            epochs=2,
            ds_config="tests/ds/zero3.json",
            log_every=1,
            save_every=100,
        ),
    )


def copy(source: Path, target: Path, world: World) -> None:
    if world.is_rank_zero:
        shutil.copytree(source, target)
    world.barrier()


def runs_begin(world: World, data: str, base: str, out: Path) -> None:
    """A run stops, leaves its state and its copies for other worlds, and goes on where it is."""
    for tuning in TUNINGS:
        config = recipe(data, base, tuning)
        stopping = replace(config, train=replace(config.train, stop_after=STOP))
        folder = out / f"{tuning}_{world.world_size}"
        state = begin(stopping, RunDirectory(folder), PreparedData.open(data), world)
        run_updates(state)
        leave_behind(folder / "held.safetensors", held(state.engine, state.users, world), world)
        state.engine.destroy()
        for target in TARGETS[world.world_size]:
            copy(folder, out / f"{tuning}_{world.world_size}_to_{target}", world)
        state = begin(config, RunDirectory(folder), PreparedData.open(data), world)
        run_updates(state)
        state.engine.destroy()


def runs_go_on(world: World, data: str, base: str, out: Path) -> None:
    """What other worlds began: the state after loading, a checkpoint of it, and the rest of the run."""
    for source, targets in TARGETS.items():
        for tuning in TUNINGS if world.world_size in targets else ():
            config = recipe(data, base, tuning)
            folder = out / f"{tuning}_{source}_to_{world.world_size}"
            state = begin(config, RunDirectory(folder), PreparedData.open(data), world)
            leave_behind(folder / "held.safetensors", held(state.engine, state.users, world), world)
            save_again(state.engine, state.users, folder, world)
            run_updates(state)
            leave_behind(folder / "after.safetensors", steps_of(state.engine), world)
            state.engine.destroy()


def in_world(world: World, data: str, base: str, out: Path) -> None:
    """All that a world of this size does, in this order of worlds: 4, 1, 2, 3, then 1 again."""
    size = world.world_size
    began = (out / f"full_{size}").exists()
    world.barrier()
    if size in TARGETS and not began:
        runs_begin(world, data, base, out)
    if size == 2:
        knots_begin(world, out)
        for source, target in CHANGES:
            knot_goes_on(source, target, world, out)
    if size > 1 or began:
        runs_go_on(world, data, base, out)
    if size == 3 or began:
        for name in VARIANTS:
            knot_goes_on(name, name, world, out)
    if size == 3:
        refusals(world, out)


def main(data: str, base: str, out: str) -> None:
    prepare_to_fork()
    for size in (4, 1, 2, 3, 1):
        run_world(size, lambda world: in_world(world, data, base, Path(out)))


if __name__ == "__main__":
    main(*sys.argv[1:])
