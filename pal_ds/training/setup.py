"""Sets a training up: data, parts, partitioned weights, users, plan, and the newest intact checkpoint."""

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pal_ds.backbones.given import GivenStates
from pal_ds.config.run_config import RunConfig
from pal_ds.data.collator import Collator
from pal_ds.data.tables import PreparedData
from pal_ds.distributed import phase
from pal_ds.distributed.preemption import StopWatch
from pal_ds.distributed.world import World
from pal_ds.engine.ds_config import ds_config_of
from pal_ds.engine.guard import UpdateGuard
from pal_ds.engine.zero import (
    parameter_bytes_on_this_rank,
    partitioned_loading,
    start_inference_engine,
    start_training_engine,
)
from pal_ds.errors import UserError
from pal_ds.feature_cache.encode import encode_once
from pal_ds.feature_cache.folders import cache_folders
from pal_ds.model import RewardModel
from pal_ds.modeling.build import Parts, assemble, base_weights_of, load_backbone
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.evaluation import open_eval_sets
from pal_ds.training.init_from.load import load_taken_over
from pal_ds.training.metrics_logger import Tracker
from pal_ds.training.resume import resume
from pal_ds.training.state import EvalSet, Training, plan_of
from pal_ds.training.users import seen_users
from pal_ds.users import TrainedUsers

logger = logging.getLogger(__name__)

SLOW = 6.0
"""Patience for what transformers and DeepSpeed do with a whole model, as they say nothing of their progress."""


def start_training(
    config: RunConfig,
    run: RunDirectory,
    data: PreparedData,
    world: World,
    *,
    encoded: Collator | None = None,
    trust_checkpoint: bool = False,
) -> Training:
    """Loads and shards everything and restores the newest intact checkpoint, if any.

    Raises:
        StopAsked: a stop was asked for while texts were being encoded; on every rank, and the cache keeps them.
    """
    started = time.monotonic()
    watch = StopWatch(config.train.time_limit_minutes)
    parts = assemble(config, data, run)
    check_token_budget(config, parts, data)
    plan = plan_of(config, data)
    ds_config = ds_config_of(config.train, world.world_size)
    users, table_rows, generic_row = seen_users(config, data, parts.head, world)
    collator = replace(
        encoded or parts.collator,
        table_rows=table_rows,
        generic_row=generic_row,
        contexts=parts.collator.contexts,
    )
    backbone: nn.Module = GivenStates()
    base_weights = world.from_rank_zero(lambda: base_weights_of(parts))
    if encoded is None and parts.needs_store:
        judged = np.concatenate([plan.comparisons, data.rows("dev")])
        leave = functools.partial(watch.leave_if_asked, world)
        collator = encode_frozen(parts, collator, judged, config, base_weights, world, leave)
    elif encoded is None:
        backbone = load_partitioned(parts, config, ds_config, world)
    sets = other_sets(parts, collator, config, base_weights, users, world)
    origin = load_taken_over(config, run, parts.head, users)
    if config.train.precision == "bf16":
        # ZeRO-3 packs all weights into one buffer, so the head shares the backbone's dtype; masters stay fp32.
        parts.head.to(torch.bfloat16)
    guard = UpdateGuard(config.train, world)
    phase.enter("start the engine", patience=SLOW)
    engine = start_training_engine(
        RewardModel(backbone, parts.head, config.loss.lm_weight), config.optim, ds_config, guard
    )
    tracker = Tracker(run, config, world)
    state = Training(
        config, run, world, data, parts, collator, engine, users, plan, guard, watch, tracker
    )
    state.base_weights, state.origin, state.eval_sets = base_weights, origin, sets
    resume(state, trust=trust_checkpoint)
    held, whole = parameter_bytes_on_this_rank(engine.module)
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    logger.info(
        "ready at update %d of %d after %.1f s: %s parameters, %.3f of their bytes on this rank",
        state.step,
        state.num_updates,
        time.monotonic() - started,
        f"{num_parameters:,}",
        held / max(whole, 1),
    )
    return state


def check_token_budget(config: RunConfig, parts: Parts, data: PreparedData) -> None:
    """Raises UserError for a budget of tokens where updates read none."""
    reads_none = parts.needs_store or data.response_vectors is not None
    if config.train.micro_batch_tokens is not None and reads_none:
        raise UserError(
            "train.micro_batch_tokens: updates read no tokens here, as the backbone is frozen or the records are "
            "vectors. Unset it; train.micro_batch_pairs bounds a micro-batch."
        )


def load_partitioned(
    parts: Parts, config: RunConfig, ds_config: dict[str, Any], world: World
) -> nn.Module:
    """The backbone for its tuning, partitioned as it is read where the engine is ZeRO-3."""
    phase.enter("load weights", patience=SLOW)
    with partitioned_loading(ds_config):
        gpu, language = world.device.type == "cuda", config.loss.lm_weight > 0
        return load_backbone(parts, config, gpu=gpu, language=language)


def encode_frozen(
    parts: Parts,
    collator: Collator,
    rows: np.ndarray,
    config: RunConfig,
    base_weights: str | None,
    world: World,
    between: Callable[[], None] = lambda: None,
) -> Collator:
    """The collator with stored states of every text of the comparisons `rows`, from `backbone.cache` where it is set.

    Weights are loaded for states that are not in the cache, and not needed after it. `base_weights` is their
    fingerprint; `between` is called before each forward.
    """
    ds_config = ds_config_of(config.train, world.world_size)

    def load() -> nn.Module:
        backbone = load_partitioned(parts, config, ds_config, world)
        phase.enter("start the encoder", patience=SLOW)
        return start_inference_engine(backbone, ds_config)

    gpu, precision = world.device.type == "cuda", config.train.precision
    caches = world.from_rank_zero(
        lambda: cache_folders(parts, collator, config, base_weights, precision, gpu=gpu)
    )
    batch_texts = config.backbone.encode_batch_texts
    return encode_once(load, collator, rows, batch_texts, world, caches, between)


def other_sets(
    parts: Parts,
    collator: Collator,
    config: RunConfig,
    base_weights: str | None,
    users: TrainedUsers,
    world: World,
) -> list[EvalSet]:
    """`train.eval_sets`, their texts encoded where the backbone is frozen. Raises UserError as `open_eval_sets`."""
    paths = config.train.eval_sets
    sets = world.on_every_rank(lambda: open_eval_sets(paths, collator.data, collator, users.ids))
    if not parts.needs_store:
        return sets
    return [
        replace(s, collator=encode_frozen(parts, s.collator, s.rows, config, base_weights, world))
        for s in sets
    ]
