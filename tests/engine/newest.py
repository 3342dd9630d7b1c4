"""The newest intact step as a process alone sees it."""

from pathlib import Path

import torch

from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.manifest import Manifest
from pal_ds.engine.checkpoint.verify import newest_intact_for_all
from pal_ds.runs.run_dir import RunDirectory


def newest_intact(run: RunDirectory, *, trust: bool = False) -> tuple[Path, Manifest] | None:
    return newest_intact_for_all(run, World(0, 1, torch.device("cpu")), trust=trust)
