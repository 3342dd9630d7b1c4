"""Worker of test_language_loss: engine variants with `loss.lm_weight`, and a run that goes on at another world size."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pal_ds.config.recipe import read_recipe
from pal_ds.config.run_config import RunConfig
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import leave
from pal_ds.engine.process_group import distributed
from pal_ds.losses import PreferenceLoss
from pal_ds.runs.run_dir import RunDirectory
from tests.engine import parity_worker
from tests.engine.parity_worker import recipe, run_variant
from tests.one_training import train

CASES = (("apart", "full"), ("tied", "full"), ("apart", "lora"))
LM_WEIGHT = 0.5
LAST = 3


def with_language(folder: Path, base: str, tuning: str, *, many: bool) -> RunConfig:
    """The reference is padded at ZeRO-0 on one rank; the other is packed, at ZeRO-3, and computes activations again."""
    config = recipe(str(folder / "data"), str(folder / base), tuning, 3 if many else 0)
    packing: Any = "packed" if many else "padded"
    backbone = replace(config.backbone, packing=packing)
    return replace(config, backbone=backbone, loss=PreferenceLoss(lm_weight=LM_WEIGHT))


def go_on(folder: Path, data: PreparedData, name: str, base: str, stop: int, world: Any) -> None:
    config = with_language(folder, base, "full", many=True)
    config = replace(config, train=replace(config.train, stop_after=stop))
    run = RunDirectory(folder / name)
    train(config, run, data, world)
    keys = [f"--data.path={data.path}", f"--backbone.path={folder / base}"]
    keys += ["--head=PalA", "--head.num_prototypes=3", f"--loss.lm_weight={LM_WEIGHT}"]
    world.from_rank_zero(lambda: run.write_config(read_recipe(keys)[1]))


def main(out: str) -> None:
    folder = Path(out)
    data = PreparedData.open(folder / "data")
    # Two of them are of one pair.
    parity_worker.NUM_UPDATES = 8
    with distributed() as world:
        many = world.world_size > 1
        for base, tuning in CASES:
            config = with_language(folder, base, tuning, many=many)
            figures = run_variant(config, 2 if many else 1, folder / "variant", world)
            if world.is_rank_zero:
                np.savez(folder / f"{base}_{tuning}_{world.world_size}.npz", **figures)
        for base in ("apart", "tied"):
            if many:
                go_on(folder, data, f"{base}_whole", base, LAST, world)
            if base == "tied":
                go_on(folder, data, "tied_moved", base, 2 if many else LAST, world)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
