"""Worker of test_stages: runs that start from one another, at as many ranks as it is launched with."""

import shutil
import sys
from pathlib import Path
from typing import Any

from pal_ds.backbones.config import BackboneConfig, LoraOptions
from pal_ds.config.recipe import read_recipe
from pal_ds.config.run_config import OptimConfig, RunConfig, TrainConfig
from pal_ds.data.prepare import DataConfig
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World, leave
from pal_ds.engine.process_group import distributed
from pal_ds.heads import BradleyTerry, PalA
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.init_from.copy import take_over
from pal_ds.users import UsersConfig
from tests.one_training import train

HEADS = {
    "bt": BradleyTerry,
    "pal": lambda size: PalA(size, num_prototypes=3),
    "wide": lambda size: PalA(size, num_prototypes=4),
}
HEAD_KEYS = {
    "bt": "{class_path: BradleyTerry}",
    "pal": "{class_path: PalA, init_args: {num_prototypes: 3}}",
}


def recipe(
    data: str, head: str, tuning: Any, origin: str | None, base: str | None, **settings: Any
) -> RunConfig:
    """A still learning rate shows what a run starts from: nothing of the model moves."""
    rate = settings.pop("rate", 3e-3)
    return RunConfig(
        data=DataConfig(path=data, source=None),
        head=HEADS[head],
        backbone=BackboneConfig(
            path=base, tuning=tuning, lora=LoraOptions(rank=4), cache=settings.pop("cache", None)
        ),
        optim=OptimConfig(learning_rate=rate, schedule="constant", warmup_fraction=0),
        users=UsersConfig(learning_rate=0.5 if rate else 1e-30, init_std=1.0),
        train=TrainConfig(
            batch_pairs=16,
            micro_batch_pairs=4,
            ds_config="tests/ds/zero3.json",
            log_every=1,
            init_from=origin,
            **{"stop_after": 1, **settings},
        ),
    )


def write_config(config: RunConfig, head: str, run: RunDirectory) -> None:
    """config.yaml, which readers of the run open."""
    backbone, start = config.backbone, config.train
    keys = [f"--data.path={config.data.path}", f"--head={HEAD_KEYS[head]}"]
    keys += [f"--backbone.path={backbone.path}"] if backbone.path else []
    keys += [f"--train.init_from={start.init_from}"] if start.init_from else []
    keys += [f"--backbone.tuning={backbone.tuning}", "--backbone.lora.rank=4"]
    run.write_config(read_recipe(keys)[1])


def start(
    world: World, out: Path, name: str, data: str, head: str, tuning: str, origin: Any, **more: Any
) -> None:
    """One stage: takes over where it has an origin, trains, leaves the run in OUT/NAME."""
    run = RunDirectory(out / name)
    base = more.pop("base", None)
    config = recipe(data, head, tuning, None if origin is None else str(origin), base, **more)
    tables = PreparedData.open(data)
    if origin is not None:
        world.from_rank_zero(lambda: bool(take_over(config, tables, run, trust=False)))
    train(config, run, tables, world)
    world.from_rank_zero(lambda: write_config(config, head, run))


def two_ranks(world: World, out: Path, data: str, other: str, base: str) -> None:
    start(world, out, "base", data, "bt", "full", None, base=base, stop_after=2)
    scored = {"eval_at_start": True, "eval_sets": {"kept": other}}
    start(world, out, "general", data, "bt", "full", out / "base", rate=0.0, **scored)
    start(world, out, "customised", other, "pal", "full", out / "general", rate=0.0)
    start(world, out, "adapted", data, "pal", "lora", out / "base", rate=3e-2, stop_after=2)
    start(world, out, "onward", other, "pal", "lora", out / "adapted", rate=0.0)
    start(world, out, "frozen", data, "pal", "frozen", None, base=base, **scored)
    world.barrier()
    if world.is_rank_zero:
        shutil.copytree(out / "adapted", out / "leaving")
    world.barrier()
    scored = {"eval_at_start": True, "eval_sets": {"general": data}}
    start(world, out, "whole", other, "pal", "lora", out / "leaving", stop_after=3, **scored)
    start(world, out, "stopped", other, "pal", "lora", out / "leaving", stop_after=1, **scored)
    world.barrier()
    if world.is_rank_zero:
        shutil.rmtree(out / "leaving")
    world.barrier()
    start(world, out, "stopped", other, "pal", "lora", out / "leaving", stop_after=3, **scored)


def one_rank(world: World, out: Path, other: str) -> None:
    start(world, out, "alone", other, "pal", "full", out / "adapted", rate=0.0)
    start(world, out, "of_export", other, "pal", "full", out / "adapted.out", rate=0.0)
    start(world, out, "of_stock", other, "bt", "lora", out / "base.out", rate=0.0)


def main(out: str, data: str, other: str, base: str) -> None:
    with distributed() as world:
        if world.world_size == 2:
            two_ranks(world, Path(out), data, other, base)
        else:
            one_rank(world, Path(out), other)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
