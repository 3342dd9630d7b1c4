"""The training loop. It knows no method: parts come from the recipe, figures go to the run directory."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pal_ds.assemble import Parts, assemble, base_weights_of, load_backbone
from pal_ds.backbones.given import GivenStates
from pal_ds.config import RunConfig
from pal_ds.data.batch import Batch, Collator
from pal_ds.data.plan import UpdatePlan, split_update
from pal_ds.data.tables import PreparedData
from pal_ds.engine.checkpoint import (
    load_checkpoint,
    newest_intact,
    refuse_other_base,
    refuse_other_launch,
    retain,
    save_checkpoint,
)
from pal_ds.engine.dist import World
from pal_ds.engine.ds_config import ds_config_of
from pal_ds.engine.frozen import encode_once
from pal_ds.engine.optim import apply_settings
from pal_ds.engine.sharding import (
    parameter_bytes_on_this_rank,
    partitioned_loading,
    start_inference_engine,
    start_training_engine,
)
from pal_ds.engine.step import Stepper, UpdateStats
from pal_ds.errors import UserError
from pal_ds.evaluate import dev_temperature, figures_of, predict, user_mixtures
from pal_ds.model import RewardModel
from pal_ds.progress import progress_bar
from pal_ds.run_dir import RunDirectory, write_json
from pal_ds.tracking import Tracker
from pal_ds.users import UserTable

logger = logging.getLogger(__name__)


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
    users: UserTable
    plan: UpdatePlan
    step: int = 0
    best: dict[str, Any] | None = None
    """Step and accuracy of the best dev evaluation so far."""
    base_weights: str | None = None
    """What the frozen weights are that no checkpoint holds; None where all weights are trained."""

    @property
    def num_updates(self) -> int:
        return self.config.train.epochs * self.plan.updates_per_epoch

    def due(self, every: int) -> bool:
        """Whether the update just made closes an interval of `every` updates; 0 means an epoch."""
        return (
            self.step % (every or self.plan.updates_per_epoch) == 0 or self.step == self.num_updates
        )


def train(
    config: RunConfig,
    run: RunDirectory,
    data: PreparedData,
    world: World,
    *,
    encoded: Collator | None = None,
    trust_checkpoint: bool = False,
    recipe: str | None = None,
) -> Collator:
    """Trains until the last update (or `train.stop_after`), resuming from the newest intact checkpoint.

    Returns the collator, which a sweep over heads and seeds on one frozen backbone passes on as `encoded`.
    `recipe` (YAML) becomes the run's config.yaml once all is loaded, so that a start that fails changes nothing.
    """
    state = start_training(
        config, run, data, world, encoded=encoded, trust_checkpoint=trust_checkpoint
    )
    try:
        if recipe is not None:
            world.from_rank_zero(lambda: run.write_config(recipe))
        run_updates(state)
    finally:
        # Without this a finished process may abort in DeepSpeed's background threads.
        state.engine.destroy()
    return state.collator


def run_updates(state: Training) -> None:
    """The loop: update, log, evaluate, save."""
    config, world = state.config.train, state.world
    stepper = Stepper(
        state.engine, state.users, state.config.loss, state.config.optim, state.config.users.learning_rate,
        world, state.num_updates, config.seed, state.parts.needs_users,
    )  # fmt: skip
    last = min(config.stop_after or state.num_updates, state.num_updates)
    tracker = Tracker(state.run, state.config, world)
    with progress_bar(
        "training", state.num_updates, shown=world.is_rank_zero, unit="pairs"
    ) as advance:
        for _ in range(state.step):
            advance(0)
        while state.step < last:
            stats = run_update(state, stepper)
            state.step += 1
            tracker.add(stats)
            if state.step % config.log_every == 0 or state.step == last:
                tracker.log(state.step, state.step / state.plan.updates_per_epoch)
            improved = state.due(config.eval_every) and evaluate_on_dev(state, tracker)
            if improved or state.due(config.save_every) or state.step == last:
                save(state)
            advance(stats.num_pairs, loss=tracker.last_loss)
    tracker.close()


def run_update(state: Training, stepper: Stepper) -> UpdateStats:
    """Builds this rank's micro-batches of the next update and makes it."""
    config, world = state.config.train, state.world
    epoch, index = divmod(state.step, state.plan.updates_per_epoch)
    rows = state.plan.update(epoch, index)
    runs = split_update(len(rows), world.world_size, config.micro_batch_pairs)
    batches = [collate(state, rows, step_runs[world.rank]) for step_runs in runs]
    return stepper.run(state.step, batches, runs, state.collator.user_rows(rows))


def collate(state: Training, rows: np.ndarray, positions: np.ndarray) -> Batch:
    """The micro-batch of these positions of an update."""
    noise = (state.config.train.seed, state.step, state.parts.head.num_prototypes)
    noise = noise if state.parts.needs_users else None
    return state.collator(rows[positions], positions, noise, int(rows[0])).to(state.world.device)


def evaluate_on_dev(state: Training, tracker: Tracker) -> bool:
    """Logs figures on the dev split (seen users); whether its accuracy is the best of the run so far."""
    rows = state.data.rows("dev")
    if len(rows) == 0:
        return False
    state.engine.eval()
    mixtures = user_mixtures(state.parts.head, state.users).to(state.world.device)
    margins = predict(
        state.engine,
        state.collator,
        rows,
        mixtures,
        state.config.train.micro_batch_pairs,
        state.world,
    )
    temperature = dev_temperature(
        margins, state.data.comparisons["label"][rows].astype(float), state.config.loss.kind
    )
    figures = figures_of(state.data, rows, margins, temperature)
    tracker.log_dev(state.step, figures)
    best = state.best
    improved = state.world.from_rank_zero(
        lambda: best is None or figures["accuracy"] > best["dev_accuracy"]
    )
    if improved:
        state.best = {
            "step": state.step,
            "dev_accuracy": figures["accuracy"],
            "temperature": temperature,
        }
    return improved


def save(state: Training) -> None:
    """One checkpoint, then the best pointer, then the deletion of old ones: never the other way round."""
    facts = {
        "dataset_hash": state.data.hash,
        "num_updates": state.num_updates,
        "best": state.best,
        "base_weights": state.base_weights,
    }
    save_checkpoint(state.engine, state.users, state.run, state.step, state.world, facts)

    def publish() -> None:
        if state.best is not None:
            write_json(state.run.path / "best.json", state.best)
        retain(
            state.run,
            max(2, state.config.train.keep_checkpoints),
            None if state.best is None else state.best["step"],
        )

    state.world.from_rank_zero(publish)


def start_training(
    config: RunConfig,
    run: RunDirectory,
    data: PreparedData,
    world: World,
    *,
    encoded: Collator | None = None,
    trust_checkpoint: bool = False,
) -> Training:
    """Loads and shards everything and restores the newest intact checkpoint, if any."""
    started = time.monotonic()
    parts = assemble(config, data, run)
    train_rows = data.rows("train")
    if len(train_rows) == 0:
        raise UserError(
            f"{data.path}: its train split is empty. Prepare with smaller dev and test fractions."
        )
    ds_config = ds_config_of(config.train, world.world_size)
    users, table_rows = seen_users(config, data, parts.head.num_prototypes, world)
    collator = replace(parts.collator, table_rows=table_rows)
    backbone: nn.Module = GivenStates()
    if encoded is None:
        with partitioned_loading(ds_config):
            backbone = load_backbone(parts, config, gpu=world.device.type == "cuda")
    if parts.needs_store:
        if encoded is None:
            judged = np.concatenate([train_rows, data.rows("dev")])
            encoder = start_inference_engine(backbone, ds_config)
            encoded = encode_once(
                encoder, collator, judged, config.backbone.encode_batch_texts, world
            )
            del encoder
        collator = replace(encoded, table_rows=table_rows)
        backbone = GivenStates()
    if config.train.precision == "bf16":
        # ZeRO-3 packs all weights into one buffer, so the head shares the backbone's dtype; masters stay fp32.
        parts.head.to(torch.bfloat16)
    engine = start_training_engine(RewardModel(backbone, parts.head), config.optim, ds_config)
    items = data.response_prompt[data.comparisons["a"][train_rows]]
    settings = config.train
    plan = UpdatePlan(
        train_rows, items, settings.batch_pairs, settings.seed, data.hash, settings.shuffle_unit
    )
    state = Training(config, run, world, data, parts, collator, engine, users, plan)
    state.base_weights = world.from_rank_zero(lambda: base_weights_of(parts))
    resume(state, trust=trust_checkpoint)
    held, whole = parameter_bytes_on_this_rank(engine.module)
    num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())
    logger.info(
        "ready at update %d of %d after %.1f s: %s parameters, %.3f of their bytes on this rank",
        *(state.step, state.num_updates, time.monotonic() - started),
        *(f"{num_parameters:,}", held / max(whole, 1)),
    )
    return state


def seen_users(
    config: RunConfig, data: PreparedData, num_prototypes: int, world: World
) -> tuple[UserTable, np.ndarray]:
    """A fresh table of the users who may be trained on, and each data user's row in it (-1: held out)."""
    ids = [user for user, seen in zip(data.users, data.user_seen, strict=True) if seen]
    table = UserTable(num_prototypes, ids, config.users, config.train.seed, world.device)
    table_rows = np.where(data.user_seen, np.cumsum(data.user_seen) - 1, -1)
    return table, table_rows.astype(np.int64)


def resume(state: Training, *, trust: bool) -> None:
    """Restores the newest intact checkpoint; a directory without any starts at update 0."""
    world, run = state.world, state.run

    def choose() -> tuple[str, dict[str, Any], dict[str, Any] | None] | None:
        found = newest_intact(run, trust=trust)
        if found is None:
            run.drop_metrics_after(0)
            return None
        path, manifest = found
        refuse_other_launch(path, manifest, state.data.hash, state.data.path, world.world_size)
        refuse_other_base(path, manifest, state.base_weights)
        run.drop_metrics_after(manifest["step"])
        # As the checkpoint knew it: best.json may be of a step that is damaged or was never published.
        best = manifest.get("best")
        return str(path), manifest, best if best and best["step"] in run.complete_steps() else None

    found = world.from_rank_zero(choose)
    if found is None:
        return
    path, manifest, state.best = found
    load_checkpoint(state.engine, state.users, Path(path), manifest, world)
    apply_settings(state.engine.optimizer.param_groups, state.config.optim)
    state.step = int(manifest["step"])
    if world.is_rank_zero:
        logger.warning("resuming from %s at update %d of %d", path, state.step, state.num_updates)
