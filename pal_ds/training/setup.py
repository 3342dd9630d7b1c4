"""Set-up of a training: data, parts, partitioned weights, users, plan, and the newest intact checkpoint restored."""

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pal_ds.backbones.given import GivenStates
from pal_ds.config.run_config import RunConfig
from pal_ds.data.collator import Collator
from pal_ds.data.tables import PreparedData
from pal_ds.data.verification import verify_content
from pal_ds.distributed import phase
from pal_ds.distributed.preemption import StopWatch
from pal_ds.engine.checkpoint.checkpoint import (
    load_checkpoint,
    refuse_other_base,
    refuse_other_launch,
)
from pal_ds.engine.checkpoint.manifest import Manifest
from pal_ds.engine.checkpoint.verify import newest_intact_for_all
from pal_ds.engine.guard import UpdateGuard
from pal_ds.engine.optim import apply_settings
from pal_ds.engine.training_engine import (
    TrainingEngine,
    parameter_bytes_on_this_rank,
    partitioned_loading,
    start_inference_engine,
    start_training_engine,
)
from pal_ds.errors import UserError
from pal_ds.feature_cache.encode import encode_once
from pal_ds.feature_cache.folders import cache_folders
from pal_ds.heads.base import Head
from pal_ds.heads.projector import has_inert_dropout
from pal_ds.io.boundary import reading
from pal_ds.model import RewardModel
from pal_ds.modeling.build import Parts, RunContext, base_weights_of, load_backbone
from pal_ds.modeling.own_classes import warn_of_no_bound
from pal_ds.runs.run_dir import BestEvaluation
from pal_ds.tie_models import TieThreshold, threshold_of_share
from pal_ds.training.evaluation import EvalSet, open_eval_sets
from pal_ds.training.init_from.copy import load_taken_over
from pal_ds.training.log_lines import ProgressLines
from pal_ds.training.metrics_logger import MetricsLogger
from pal_ds.training.state import Training, plan_of, prior_of_rows, seen_users
from pal_ds.training.trackers import check_trackers
from pal_ds.users import RowPriorState
from pal_ds.users.ids import UserIds

logger = logging.getLogger(__name__)

SLOW = 6.0
"""Patience (`phase.enter`) for what transformers and DeepSpeed do with a whole model: they report no progress."""


def start_training(
    context: RunContext,
    parts: Parts,
    *,
    encoded: Collator | None = None,
    trust_checkpoint: bool = False,
) -> Training:
    """Load and shard everything, and restore the newest intact checkpoint if there is one.

    `encoded` has stored states of the same texts, of an earlier run on the same frozen backbone; `trust_checkpoint`
    reads checkpoints of another owner.

    Raises:
        StopRequested: a stop was asked for before the engine was started; on every rank. The cache keeps encoded texts.
        UserError: the recipe does not fit the data, or a checkpoint is not of this run.
    """
    started = time.monotonic()
    config, data, world = context.config, context.data, context.world
    watch = StopWatch(config.train.time_limit_minutes)
    leave = functools.partial(watch.leave_if_requested, world)
    leave()
    check_before_loading(config, parts, data)
    plan = plan_of(config, data)
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
        rows = np.concatenate([plan.comparisons, data.rows("dev")])
        collator = encode_frozen(context, parts, collator, rows, base_weights, between=leave)
    elif encoded is None:
        backbone = load_partitioned(context, parts)
    leave()
    sets = eval_sets_of(context, parts, collator, users.ids, base_weights)
    origin = load_taken_over(config, context.run, parts.head, users)
    guard = UpdateGuard(config.train, world)
    num_updates = config.train.epochs * plan.updates_per_epoch
    state = Training(
        context=context,
        parts=parts,
        collator=collator,
        engine=start_engine(context, backbone, parts.head, guard),
        users=users,
        plan=plan,
        guard=guard,
        watch=watch,
        metrics=MetricsLogger(context.run, config, world, ProgressLines(world, num_updates)),
        prior=prior_of_rows(config, data, parts.head, table_rows, world.device),
        eval_sets=sets,
        origin=origin,
        base_weights=base_weights,
    )
    resume(state, trust=trust_checkpoint)
    log_size(state, time.monotonic() - started)
    return state


def eval_sets_of(
    context: RunContext, parts: Parts, collator: Collator, ids: UserIds, base_weights: str | None
) -> list[EvalSet]:
    """Open and verify `train.eval_sets`, with stored states where the run has them.

    Raises:
        UserError: as `open_eval_sets` and `verify_content` do.
    """
    paths, world = context.config.train.eval_sets, context.world
    sets = world.on_every_rank(lambda: open_eval_sets(paths, context.data, collator, ids))
    for of_set in sets:
        verify_content(of_set.collator.data.path, of_set.collator.data.info, world)
    if not parts.needs_store:
        return sets
    encode = functools.partial(encode_frozen, context, parts, base_weights=base_weights)
    return [replace(s, collator=encode(s.collator, s.rows)) for s in sets]


def start_engine(
    context: RunContext, backbone: nn.Module, head: Head, guard: UpdateGuard
) -> TrainingEngine:
    """Hand backbone and head to DeepSpeed as one module."""
    config = context.config
    if config.train.precision == "bf16":
        # ZeRO-3 packs all weights into one buffer, so the head shares the backbone's dtype; masters stay fp32.
        head.to(torch.bfloat16)
    phase.enter("start the engine", patience=SLOW)
    model = RewardModel(
        backbone,
        head,
        config.loss.lm_weight,
        tie_threshold=first_threshold(context),
        feature_dropout=config.train.feature_dropout,
    )
    return start_training_engine(model, config.optim, context.ds_config, guard)


def first_threshold(context: RunContext) -> TieThreshold | None:
    """The threshold of ties before training, from their share of the train split; None where the loss has none."""
    loss, data = context.config.loss, context.data
    if not loss.has_threshold:
        return None
    labels = data.comparisons["label"][data.rows("train")]
    return TieThreshold(threshold_of_share(float((labels == 0).mean()), loss.ties))


def log_size(state: Training, seconds: float) -> None:
    """Log where the run stands, how many parameters it has, and which share of their bytes this rank holds."""
    module = state.engine.module
    held, whole = parameter_bytes_on_this_rank(module)
    logger.info(
        "ready at update %d of %d after %.1f s: %s parameters, %.3f of their bytes on this rank",
        state.step,
        state.num_updates,
        seconds,
        f"{sum(getattr(p, 'ds_numel', p.numel()) for p in module.parameters()):,}",
        held / max(whole, 1),
    )


def check_before_loading(config: RunConfig, parts: Parts, data: PreparedData) -> None:
    """Raise UserError for a tracker that is not installed, or a budget of tokens where updates read none."""
    check_trackers(config)
    warn_of_no_bound(config.loss.shape)
    reads_none = parts.needs_store or data.response_vectors is not None
    if config.train.micro_batch_tokens is not None and reads_none:
        raise UserError(
            "train.micro_batch_tokens: updates read no tokens here, as the backbone is frozen or the records are "
            "vectors. Unset it; train.micro_batch_pairs bounds a micro-batch."
        )
    if has_inert_dropout(parts.head):
        logger.warning(
            "head: its dropout follows activations, of which num_layers: 1 has none, so it does nothing. "
            "train.feature_dropout drops what the head reads, whatever its layers."
        )


def load_partitioned(context: RunContext, parts: Parts) -> nn.Module:
    """Load the backbone for its tuning, partitioned as it is read where the engine is ZeRO-3."""
    phase.enter("load weights", patience=SLOW)
    config = context.config
    with partitioned_loading(context.ds_config):
        gpu, language = context.world.device.type == "cuda", config.loss.lm_weight > 0
        return load_backbone(parts, config, gpu=gpu, language=language)


def encode_frozen(
    context: RunContext,
    parts: Parts,
    collator: Collator,
    rows: np.ndarray,
    base_weights: str | None,
    *,
    between: Callable[[], None] = lambda: None,
) -> Collator:
    """Give the collator stored states of every text of the comparisons `rows`, from `backbone.cache` where it is set.

    Weights are loaded for states that are not in the cache, and not needed after it. The collator's data may be others
    than the context's; `rows` (int64 [n]) are comparisons of them. `between` is called before each forward.

    Raises:
        StopRequested: what `between` raises; the cache keeps what was encoded.
    """
    config, world = context.config, context.world

    def load() -> nn.Module:
        backbone = load_partitioned(context, parts)
        phase.enter("start the encoder", patience=SLOW)
        return start_inference_engine(backbone, context.ds_config)

    gpu, precision = world.device.type == "cuda", config.train.precision
    caches = world.from_rank_zero(
        lambda: cache_folders(parts, collator, config, base_weights, precision, gpu=gpu)
    )
    batch_texts = config.backbone.encode_batch_texts
    return encode_once(load, collator, rows, batch_texts, world, caches, between)


def resume(state: Training, *, trust: bool) -> None:
    """Restore the newest intact checkpoint; a directory without any starts at update 0."""
    world, run = state.world, state.run
    phase.enter("resume")

    intact = newest_intact_for_all(run, world, trust=trust)

    def choose() -> tuple[str, Manifest, BestEvaluation | None] | None:
        if intact is None:
            run.drop_metrics_after(-1)
            return None
        path, manifest = intact
        refuse_other_launch(path, manifest, state.data.hash, state.data.path)
        refuse_other_base(path, manifest, state.base_weights)
        # As the checkpoint knew it: best.json may be of a step that is damaged or was never published.
        best = manifest.get("best")
        return str(path), manifest, best if best and best["step"] in run.complete_steps() else None

    checkpoint = world.from_rank_zero(choose)
    if checkpoint is None:
        return
    path, manifest, state.best = checkpoint
    phase.enter("load the checkpoint", int(manifest["step"]))
    load_checkpoint(state.engine, state.users, Path(path), manifest, world)
    apply_settings(state.engine.optimizer.param_groups, state.config.optim)
    state.step = int(manifest["step"])
    state.owes_evaluation = manifest["owes_evaluation"]
    state.guard.load_state_dict(manifest["guard"])
    restore_prior(state, manifest.get("users_prior"))
    state.metrics.resume(manifest["unlogged"])
    state.watch.save_seconds = manifest["save_seconds"]
    # Last of all: a start that is refused changes nothing.
    world.from_rank_zero(
        lambda: run.drop_metrics_after(state.step, owes_evaluation=state.owes_evaluation)
    )
    if world.is_rank_zero:
        logger.warning("resuming from %s at update %d of %d", path, state.step, state.num_updates)


def restore_prior(state: Training, stored: RowPriorState | None) -> None:
    """Take over the prior of the table's rows from a checkpoint; one that an earlier version wrote has none."""
    if state.prior is None or not state.learns_prior:
        return
    if stored is None:
        logger.warning(
            "users.prior: the checkpoint holds no prior, which is learnt anew from the users that it holds"
        )
        return
    with reading(
        state.run.path, "prior of users in a checkpoint", "Take another checkpoint of the run."
    ):
        state.prior.load_state_dict(stored)
