"""Sets a training up: data, parts, partitioned weights, users, plan, and the newest intact checkpoint."""

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pal_ds import phase
from pal_ds.assemble import Parts, assemble, base_weights_of, load_backbone
from pal_ds.backbones.given import GivenStates
from pal_ds.cache_folders import cache_folders
from pal_ds.config import RunConfig
from pal_ds.data.collator import Collator
from pal_ds.data.draws import Draws
from pal_ds.data.loader import UpdateSource
from pal_ds.data.plan import UpdatePlan
from pal_ds.data.tables import PreparedData
from pal_ds.engine.dist import World
from pal_ds.engine.ds_config import ds_config_of
from pal_ds.engine.frozen import encode_once
from pal_ds.engine.guard import UpdateGuard
from pal_ds.engine.sharding import (
    parameter_bytes_on_this_rank,
    partitioned_loading,
    start_inference_engine,
    start_training_engine,
)
from pal_ds.engine.step import Stepper
from pal_ds.engine.stop import StopWatch
from pal_ds.errors import UserError
from pal_ds.eval_in_training import EvalSet, open_eval_sets
from pal_ds.model import RewardModel
from pal_ds.resume import resume
from pal_ds.run_dir import RunDirectory
from pal_ds.taken_over import load_taken_over
from pal_ds.tracking import Tracker
from pal_ds.user_start import seen_users
from pal_ds.users import TrainedUsers

logger = logging.getLogger(__name__)

SLOW = 6.0
"""Patience for what transformers and DeepSpeed do with a whole model, as they say nothing of their progress."""


@dataclass
class Training:
    """A run in memory: what the loop drives."""

    config: RunConfig
    run: RunDirectory
    world: World
    data: PreparedData
    parts: Parts
    collator: Collator
    engine: Any
    users: TrainedUsers
    plan: UpdatePlan
    guard: UpdateGuard
    watch: StopWatch
    tracker: Tracker
    step: int = 0
    best: dict[str, Any] | None = None
    """Step and accuracy of the best dev evaluation so far."""
    eval_sets: list[EvalSet] = field(default_factory=list)
    """What is scored beside dev at each evaluation."""
    origin: dict[str, Any] | None = None
    """What a run with `train.init_from` started from."""
    base_weights: str | None = None
    """What the frozen weights are that no checkpoint holds; None where all weights are trained."""
    owes_evaluation: bool = False
    """Whether a stop on request left out an evaluation that was due at `step`."""
    owes_save: bool = False
    """Whether a checkpoint that was due waits for the end of a row of skipped updates."""

    @property
    def num_updates(self) -> int:
        return self.config.train.epochs * self.plan.updates_per_epoch

    def due(self, every: int, step: int | None = None) -> bool:
        """Whether `step` (the update just made) closes an interval of `every` updates; 0 means an epoch."""
        step = self.step if step is None else step
        return step % (every or self.plan.updates_per_epoch) == 0 or step == self.num_updates

    @property
    def inputs(self) -> UpdateSource:
        """What this rank's updates are made from."""
        settings, head = self.config.train, self.parts.head
        return UpdateSource(
            self.plan,
            self.collator,
            self.world.rank,
            self.world.world_size,
            settings.micro_batch_pairs,
            settings.micro_batch_tokens,
            Draws(
                settings.seed,
                head.num_prototypes,
                head.needs & {"gumbel", "normal"},
                head.num_context,
            ),
            self.config.users.generic_fraction,
        )

    @property
    def stepper(self) -> Stepper:
        """What makes an update from them."""
        return Stepper(
            engine=self.engine,
            users=self.users,
            loss=self.config.loss,
            optim=self.config.optim,
            users_learning_rate=self.config.users.learning_rate,
            world=self.world,
            num_updates=self.num_updates,
            seed=self.config.train.seed,
            needs_users=self.parts.needs_users,
            guard=self.guard,
        )


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
        *(state.step, state.num_updates, time.monotonic() - started),
        *(f"{num_parameters:,}", held / max(whole, 1)),
    )
    return state


def plan_of(config: RunConfig, data: PreparedData) -> UpdatePlan:
    """Which comparisons form which update. Raises UserError where there are none."""
    rows, settings = data.rows("train"), config.train
    if len(rows) == 0:
        raise UserError(
            f"{data.path}: its train split is empty. Prepare with smaller dev and test fractions."
        )
    items = data.response_prompt[data.comparisons["a"][rows]]
    return UpdatePlan(
        rows, items, settings.batch_pairs, settings.seed, data.hash, settings.shuffle_unit
    )


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
