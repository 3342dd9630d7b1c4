"""Training figures: summed on the device, read once per interval, written to metrics.jsonl and the trackers."""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from pal_ds.config.run_config import RunConfig
from pal_ds.distributed.world import World
from pal_ds.engine.step import UpdateStats
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.log_lines import ProgressLines
from pal_ds.training.trackers import Trackers


class Unlogged(NamedTuple):
    """Sums over updates that no line of metrics.jsonl tells of yet: a checkpoint keeps them for the next start."""

    loss_sum: float = 0.0
    num_correct: float = 0.0
    num_pairs: int = 0
    num_skipped: int = 0


class MetricsLogger:
    """Collector of what updates report; every rank calls the same methods, rank 0 writes."""

    def __init__(
        self, run: RunDirectory, config: RunConfig, world: World, lines: ProgressLines
    ) -> None:
        self._run, self._config, self._world = run, config, world
        self.lines = lines
        self._pending: list[UpdateStats] = []
        self._last: UpdateStats | None = None
        self._unlogged = Unlogged()
        self._since = time.monotonic()
        self._trackers: Trackers | None = None
        self.last_loss = ""

    def open(self, step: int) -> None:
        """Open the trackers, on rank 0. Raises UserError, on every rank, where one cannot be opened."""

        def open_here() -> None:
            self._trackers = Trackers(self._run, self._config, step)

        self._world.from_rank_zero(open_here)

    def add(self, stats: UpdateStats) -> None:
        self._pending.append(stats)
        self._last = stats

    def log(self, step: int, epoch: float) -> None:
        """Write a line for the updates since the last line."""
        assert self._last is not None, "no update was made since the last line"
        sums, self._unlogged = self.unlogged(), Unlogged()
        norm, num_pairs = self._last.grad_norm, sums.num_pairs
        now = time.monotonic()
        row = {
            "step": step,
            "epoch": round(epoch, 6),
            # Of the updates that were made; null where all were skipped, as JSON has no NaN.
            "loss": sums.loss_sum / num_pairs if num_pairs else None,
            "accuracy": sums.num_correct / num_pairs if num_pairs else None,
            "grad_norm": float(norm) if norm is not None and math.isfinite(norm) else None,
            "learning_rate": self._last.learning_rate,
            "skipped_updates": sums.num_skipped,
            "pairs_per_second": num_pairs / (now - self._since),
        }
        self._since = now
        self._write(row)
        self.lines.updates(row)
        self.last_loss = f"{row['loss']:.4f}" if num_pairs else "skipped"

    def unlogged(self) -> Unlogged:
        """Return the sums since the last line; waits for the device, so only lines and checkpoints ask for them.

        Added update by update in float64: where in between a run stopped and went on changes no bit.
        """
        stats, self._pending = self._pending, []
        if stats:
            parts = torch.stack([torch.stack([s.loss_sum, s.correct]) for s in stats])
            sums = self._world.all_gather(parts).double().sum(0).tolist()
            for (loss, correct), update in zip(sums, stats, strict=True):
                loss_sum, num_correct, num_pairs, num_skipped = self._unlogged
                self._unlogged = Unlogged(
                    loss_sum + loss,
                    num_correct + correct,
                    num_pairs + update.num_pairs,
                    num_skipped + (not update.applied),
                )
        return self._unlogged

    def resume(self, sums: list[Any]) -> None:
        """Go on with the sums that a checkpoint kept."""
        self._unlogged = Unlogged(*sums)

    def log_evaluation(self, step: int, figures: Mapping[str, Mapping[str, Any]]) -> None:
        """Write a line with the figures of each set under its name: dev_accuracy, NAME_accuracy, ..."""
        kinds = (
            *("pairs", "accuracy", "user_accuracy_mean", "worst_decile_user_accuracy"),
            *("ece", "temperature"),
        )
        named = {
            f"{name}_{kind}": of_set[kind] for name, of_set in figures.items() for kind in kinds
        }
        self._write({"step": step, **named})
        self.lines.evaluation(step, {name: figures[name]["accuracy"] for name in figures})
        # The time of an evaluation is not the training's.
        self._since = time.monotonic()

    def _write(self, row: dict[str, Any]) -> None:
        # All ranks hear of a full disk: else they would wait for rank 0 in the next update.
        self._world.from_rank_zero(lambda: self._run.append_metrics(row))
        if self._trackers is not None:
            self._trackers.log(row)

    def close(self) -> None:
        """Close the trackers."""
        if self._trackers is not None:
            self._trackers.close()
