"""Training figures: summed on the device, read once per interval, written to metrics.jsonl and, if set up, wandb."""

import math
import time
from typing import Any

import torch

from pal_ds.config import RunConfig
from pal_ds.engine.dist import World
from pal_ds.engine.step import UpdateStats
from pal_ds.run_dir import RunDirectory


class Tracker:
    """Collects what updates report; every rank calls the same methods, rank 0 writes."""

    def __init__(self, run: RunDirectory, config: RunConfig, world: World) -> None:
        self._run, self._world = run, world
        self._pending: list[UpdateStats] = []
        self._since = time.monotonic()
        self.last_loss = ""
        self._wandb = (
            _start_wandb(run, config) if world.is_rank_zero and config.wandb.project else None
        )

    def add(self, stats: UpdateStats) -> None:
        self._pending.append(stats)

    def log(self, step: int, epoch: float) -> None:
        """One line for the updates since the last; the only host synchronisation outside evaluation and saving."""
        stats, self._pending = self._pending, []
        sums = torch.stack([torch.stack([s.loss_sum, s.correct]) for s in stats]).sum(0)
        loss_sum, correct = self._world.sum(sums).tolist()
        num_pairs = sum(s.num_pairs for s in stats)
        norm = stats[-1].grad_norm
        now = time.monotonic()
        row = {
            "step": step,
            "epoch": round(epoch, 6),
            # Of the updates that were made; null where all were skipped, as JSON has no NaN.
            "loss": loss_sum / num_pairs if num_pairs else None,
            "accuracy": correct / num_pairs if num_pairs else None,
            "grad_norm": float(norm) if norm is not None and math.isfinite(norm) else None,
            "learning_rate": stats[-1].learning_rate,
            "skipped_updates": sum(not s.applied for s in stats),
            "pairs_per_second": num_pairs / (now - self._since),
        }
        self._since = now
        self._write(row)
        self.last_loss = f"{row['loss']:.4f}" if num_pairs else "skipped"

    def log_dev(self, step: int, figures: dict[str, Any]) -> None:
        names = (
            "pairs",
            "accuracy",
            "user_accuracy_mean",
            "worst_decile_user_accuracy",
            "ece",
            "temperature",
        )
        self._write({"step": step, **{f"dev_{name}": figures[name] for name in names}})
        # The time of an evaluation is not the training's.
        self._since = time.monotonic()

    def _write(self, row: dict[str, Any]) -> None:
        # All ranks hear of a full disk: else they would wait for rank 0 in the next update.
        self._world.from_rank_zero(lambda: self._run.append_metrics(row))
        if self._wandb is not None:
            self._wandb.log(row, step=row["step"])

    def close(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def _start_wandb(run: RunDirectory, config: RunConfig) -> Any:
    import wandb

    settings = config.wandb
    # The key comes from wandb's own environment or netrc and never passes through our config.
    return wandb.init(
        project=settings.project, name=settings.name, mode=settings.mode, dir=str(run.path)
    )
