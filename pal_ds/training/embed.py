"""The command `embed`: a frozen backbone's states of all texts of the prepared data, into `backbone.cache`."""

import functools
import logging
from pathlib import Path

import numpy as np

from pal_ds.config.run_config import RunConfig
from pal_ds.distributed.preemption import StopRequested, StopWatch
from pal_ds.distributed.watchdog import watch
from pal_ds.engine.ds_config import check_zero_section, ds_config_of
from pal_ds.errors import UserError
from pal_ds.modeling.build import RunContext, assemble, base_weights_of
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.agreement import agree_on_data, agree_on_start
from pal_ds.training.launch import (
    joined_with_data,
    world_size_of_launch,
)
from pal_ds.training.setup import encode_frozen

logger = logging.getLogger(__name__)


def embed(config: RunConfig, recipe: str) -> bool:
    """Prepare data on a single node as `train` does, then encode what the cache lacks; return True at the end.

    `recipe` is its text, by which ranks see whether they were started alike.

    A stop that is asked for writes what is encoded and ends; the same command goes on from there.

    Raises:
        UserError: there is nothing to embed, or nowhere to keep it.
        StorageError: the cache cannot be written; the shards written before are intact.
    """
    refuse_what_has_no_cache(config)
    ds_config = ds_config_of(config.train, world_size_of_launch())
    assert config.backbone.cache is not None
    stacks = Path(config.backbone.cache, "stacks")
    with (
        joined_with_data(config) as (world, tables),
        watch(world, stacks, config.train.hang_minutes),
    ):
        agree_on_start(world, recipe, ds_config)
        check_zero_section(ds_config, config.train.ds_config)
        data = world.on_every_rank(tables)
        agree_on_data(world, data)
        if data.info["kind"] == "vectors":
            raise UserError(
                f"{data.path}: holds vectors, which are states already; there is nothing to embed. Train as it is."
            )
        # Nothing is read from a run: architectures are refused above.
        nowhere = RunDirectory(data.path)
        return encode_all(
            RunContext(config=config, run=nowhere, data=data, world=world, ds_config=ds_config)
        )


def refuse_what_has_no_cache(config: RunConfig) -> None:
    """Raise UserError, with the remedy, for a recipe whose states nobody could keep."""
    backbone = config.backbone
    if backbone.cache is None:
        raise UserError("backbone.cache: not set. Name the folder that is to hold the states.")
    if backbone.tuning != "frozen":
        raise UserError(
            f"backbone.tuning: {backbone.tuning}; only a frozen backbone gives the same states again. Set it to "
            "frozen, or train without `embed`."
        )
    if config.train.init_from is not None:
        raise UserError(
            "train.init_from: its weights are taken over by `train`, which fills backbone.cache itself. Train without "
            "`embed`, or export the run and set backbone.path."
        )
    if backbone.architecture is not None:
        raise UserError(
            "backbone.architecture: its random weights belong to a run and are made by `train`. Give backbone.path."
        )


def encode_all(context: RunContext) -> bool:
    """Encode the texts of all splits; returns False where a stop came in between."""
    config, data, world = context.config, context.data, context.world
    parts = world.on_every_rank(lambda: assemble(config, data, context.run))
    weights = world.from_rank_zero(lambda: base_weights_of(parts))
    leave = functools.partial(StopWatch(config.train.time_limit_minutes).leave_if_requested, world)
    rows = np.arange(len(data.comparisons))
    try:
        encode_frozen(context, parts, parts.collator, rows, weights, between=leave)
    except StopRequested as stop_error:
        logger.warning(
            "stopping (%s): what was encoded is kept; the same command goes on", stop_error
        )
        return False
    logger.info("%s: holds every text of %s", config.backbone.cache, data.path)
    return True
