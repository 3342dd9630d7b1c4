"""The contract of a tracker: it takes the lines of metrics.jsonl."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from pal_ds.config.run_config import TrackersConfig, WandbConfig
from pal_ds.io.files import write_json
from pal_ds.runs.run_dir import RunDirectory

Row = Mapping[str, object]
"""A line of metrics.jsonl: its step, and numbers by name (None where there is none)."""


@dataclass(frozen=True)
class Start:
    """A run that begins, or goes on at `step`, with its resolved recipe."""

    run: RunDirectory
    step: int
    recipe: Mapping[str, object]
    wandb: WandbConfig
    trackers: TrackersConfig

    def kept_id(self, tracker: str) -> str | None:
        """Return the id by which a tracker knows this run, of an earlier start."""
        return self.run.tracker_ids().get(tracker)

    def keep_id(self, tracker: str, its_id: str) -> None:
        """Write it to trackers.json, for later starts."""
        write_json(self.run.trackers_file, {**self.run.tracker_ids(), tracker: its_id})


class Tracker(ABC):
    """One place for figures. Constructing it opens the place; any exception of its library may come out of it."""

    key: ClassVar[str]
    """Key of the recipe that asks for it, as an error names it."""
    remedy: ClassVar[str]

    @abstractmethod
    def __init__(self, start: Start) -> None: ...

    @classmethod
    @abstractmethod
    def is_wanted(cls, wandb: WandbConfig, trackers: TrackersConfig) -> bool:
        """Return whether the recipe asks for it."""

    @abstractmethod
    def log(self, row: Row) -> None:
        """Take one line, which metrics.jsonl holds already."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left."""


def numbers(row: Row) -> dict[str, float]:
    """Return the figures of a line, without its step and without those that are missing."""
    return {
        name: float(value)
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


def step_of(row: Row) -> int:
    """Return the number of updates made when a line was written."""
    step = row["step"]
    assert isinstance(step, int)
    return step


def flat(tree: Mapping[str, object], above: str = "") -> dict[str, object]:
    """Return the values of a nested recipe by dotted names."""
    values: dict[str, object] = {}
    for key, value in tree.items():
        name = f"{above}{key}"
        values |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return values
