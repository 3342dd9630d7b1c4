"""Lines about a training for a log that no bar is drawn into, and for people when it ends."""

import datetime
import logging
import resource
import shlex
import sys
import time
from typing import Any

import torch
import yaml
from rich.console import Console

from pal_ds.config.consent import import_paths
from pal_ds.distributed.world import World
from pal_ds.eval.sanity_checks import FEWEST_PROMPTS, LARGEST_GAP, parted, training_accuracy
from pal_ds.runs.run_dir import BestEvaluation, MetricsRow, RunDirectory

logger = logging.getLogger(__name__)
GIB = 2**30


class ProgressLines:
    """Writes one line per line of metrics.jsonl, on rank 0, where standard error is no terminal."""

    def __init__(self, world: World, num_updates: int) -> None:
        self._written = world.is_rank_zero and not Console(stderr=True).is_terminal
        self._device, self._num_updates = world.device, num_updates
        self._begun: tuple[float, int] | None = None

    def begin(self, step: int) -> None:
        """Note that updates begin at `step`: the time left is counted from here."""
        self._begun = time.monotonic(), step

    def updates(self, row: MetricsRow) -> None:
        """Tell of the updates up to `row["step"]`: loss, accuracy, throughput, time left, memory."""
        if not self._written or self._begun is None:
            return
        since, first = self._begun
        step = row["step"]
        seconds = (time.monotonic() - since) / max(step - first, 1) * (self._num_updates - step)
        parts = [
            f"loss {_rounded(row['loss'])}",
            f"accuracy {_rounded(row['accuracy'])}",
            f"{row['pairs_per_second']:,.1f} pairs/s",
            f"{datetime.timedelta(seconds=round(seconds))} left",
            f"{self._memory():.2f} GiB",
        ]
        if row["skipped_updates"]:
            parts.append(f"{row['skipped_updates']} updates skipped")
        logger.info("update %d of %d: %s", step, self._num_updates, ", ".join(parts))

    def evaluation(self, step: int, accuracies: dict[str, float | None]) -> None:
        """Tell of an evaluation: the accuracy on each set."""
        if self._written:
            shown = ", ".join(f"{name} {_rounded(value)}" for name, value in accuracies.items())
            logger.info("update %d of %d: accuracy on %s", step, self._num_updates, shown)

    def _memory(self) -> float:
        """Peak so far: of the device where there is one, else of the process."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / GIB
        # In KiB on Linux, in bytes on macOS.
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB


def log_end(run: RunDirectory, best: BestEvaluation | None, num_skipped: int = 0) -> None:
    """Log how a finished training ended, where things lie and what comes next. Rank 0 calls it."""
    found = (
        _why_none_is_best(run)
        if best is None
        else f"best accuracy on dev {best['dev_accuracy']:.4f}, at update {best['step']}"
    )
    skipped = (
        f"; {num_skipped} updates were skipped (skipped_updates in metrics.jsonl)"
        if num_skipped
        else ""
    )
    recipe = yaml.safe_load(run.config_file.read_text()) if run.config_file.is_file() else {}
    own = import_paths({key: recipe.get(key) for key in ("head", "loss")})
    remote = (recipe.get("backbone") or {}).get("trust_remote_code")
    logger.info(
        "finished: %s%s. Everything is in %s; figures per update in metrics.jsonl. "
        "Next: `pal-ds evaluate --run_dir %s%s`",
        found,
        skipped,
        run.path,
        shlex.quote(str(run.path)),
        " --trust_code" if own or remote else "",
    )


def warn_of_gap(run: RunDirectory, best: BestEvaluation | None, num_prompts: int) -> None:
    """Warn where the best accuracy on dev is far below that in training at the end. Rank 0 calls it.

    `num_prompts` are dev's; of few of them the difference may be chance, and nothing is said.
    """
    if num_prompts < FEWEST_PROMPTS:
        return
    metrics = run.read_metrics()
    trained = training_accuracy(metrics, max((row["step"] for row in metrics), default=0))
    if best is None or trained is None:
        return
    if trained - best["dev_accuracy"] > LARGEST_GAP:
        logger.warning("%s", parted(trained, best["dev_accuracy"], "dev"))


def _why_none_is_best(run: RunDirectory) -> str:
    """Say why no checkpoint is the best: an evaluation whose accuracy is 0 was one all the same."""
    steps = [row["step"] for row in run.read_metrics() if row.get("dev_accuracy") is not None]
    if not steps:
        return "no evaluation on dev was made"
    if max(steps) == 0:
        return "dev was evaluated before the first update alone, so no checkpoint is the best"
    return (
        "no checkpoint is the best, as margins on dev were not finite in any evaluation: the training diverged, see "
        "metrics.jsonl"
    )


def _rounded(value: Any) -> str:
    return "none" if value is None else f"{value:.4f}"
