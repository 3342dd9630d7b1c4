"""Trackers that write into the run directory: CSV and TensorBoard."""

import csv
import json

from pal_ds.config.run_config import TrackersConfig, WandbConfig
from pal_ds.training.trackers.base import Row, Start, Tracker, numbers, step_of


class Csv(Tracker):
    """RUN/metrics.csv: a row for each line of metrics.jsonl, a column for each figure."""

    key = "trackers.csv"
    remedy = "Set trackers.csv to false"

    def __init__(self, start: Start) -> None:
        self._run = start.run
        self._file = start.run.path / "metrics.csv"
        self._columns: list[str] = []
        self._write_whole()

    @classmethod
    def is_wanted(cls, wandb: WandbConfig, trackers: TrackersConfig) -> bool:
        """True where `trackers.csv` is set."""
        return trackers.csv

    def log(self, row: Row) -> None:
        """Append the line; with a figure that no line had before, write the file anew."""
        if not set(row) <= set(self._columns):
            self._write_whole()
            return
        with open(self._file, "a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self._columns).writerow(row)

    def close(self) -> None:
        """Nothing is left open between lines."""

    def _write_whole(self) -> None:
        """Write the lines of metrics.jsonl, which a resumed run has cut to those before its checkpoint."""
        rows: list[Row] = list(self._run.read_metrics())
        self._columns = list(dict.fromkeys(name for row in rows for name in row))
        with open(self._file, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self._columns)
            writer.writeheader()
            writer.writerows(rows)


class TensorBoard(Tracker):
    """RUN/tensorboard: event files, for `tensorboard --logdir`."""

    key = "trackers.tensorboard"
    remedy = "Install it (pip install tensorboard), or set trackers.tensorboard to false"

    def __init__(self, start: Start) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = start.run.path / "tensorboard"
        # Later steps of an earlier start are hidden: they are made again.
        self._writer = SummaryWriter(str(folder), purge_step=start.step + 1)
        if start.step == 0:
            self._writer.add_text(
                "recipe", f"```json\n{json.dumps(start.recipe, indent=1)}\n```", 0
            )

    @classmethod
    def is_wanted(cls, wandb: WandbConfig, trackers: TrackersConfig) -> bool:
        """True where `trackers.tensorboard` is set."""
        return trackers.tensorboard

    def log(self, row: Row) -> None:
        """A scalar for each figure."""
        for name, value in numbers(row).items():
            self._writer.add_scalar(name, value, step_of(row))
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
