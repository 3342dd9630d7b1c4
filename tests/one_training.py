"""Trainings of tests: recipe, run, data and ranks as one context, and the parts assembled from them."""

from typing import Any

from pal_ds.config.run_config import RunConfig
from pal_ds.data.collator import Collator
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.modeling.build import RunContext, assemble
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training import loop
from pal_ds.training.setup import start_training
from pal_ds.training.state import Training


def begin(
    config: RunConfig, run: RunDirectory, data: PreparedData, world: World, **options: Any
) -> Training:
    """A training that stands before its next update."""
    context = RunContext.of(config, run, data, world)
    return start_training(context, assemble(config, data, run), **options)


def train(
    config: RunConfig, run: RunDirectory, data: PreparedData, world: World, **options: Any
) -> Collator | None:
    """A training to its last update."""
    context = RunContext.of(config, run, data, world)
    return loop.train(context, assemble(config, data, run), **options)
