"""Restoring of the newest intact checkpoint into a training that was just set up."""

import logging
from pathlib import Path

from pal_ds.distributed import phase
from pal_ds.engine.checkpoint.checkpoint import (
    load_checkpoint,
    refuse_other_base,
    refuse_other_launch,
)
from pal_ds.engine.checkpoint.manifest import Manifest
from pal_ds.engine.checkpoint.verify import newest_intact_for_all
from pal_ds.engine.optim import apply_settings
from pal_ds.runs.run_dir import BestEvaluation
from pal_ds.training.state import Training

logger = logging.getLogger(__name__)


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
    state.tracker.resume(manifest["unlogged"])
    state.watch.save_seconds = manifest["save_seconds"]
    # Last of all: a start that is refused changes nothing.
    world.from_rank_zero(
        lambda: run.drop_metrics_after(state.step, owes_evaluation=state.owes_evaluation)
    )
    if world.is_rank_zero:
        logger.warning("resuming from %s at update %d of %d", path, state.step, state.num_updates)
