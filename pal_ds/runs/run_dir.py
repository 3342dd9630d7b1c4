"""The run directory: resolved config, metrics, pointers, base weights. Rank 0 writes, everyone reads.

D/config.yaml  D/installation.json  D/metrics.jsonl  D/checkpoints/step_N/  D/latest.json  D/best.json
D/base/  D/init/  D/eval/NAME.json
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

from pal_ds.errors import UserError, writing
from pal_ds.io.boundary import read_object
from pal_ds.io.files import at_home, write_atomically, write_json

SECONDS_TO_EVALUATE = 3600.0
"""Time after which a temporary file was left by a killed writer: far longer than an evaluation takes to write."""

MetricsRow = dict[str, Any]
"""A line of metrics.jsonl: `step` and the figures of an interval or of an evaluation, under names that sets give."""

logger = logging.getLogger(__name__)
_DELETE = "Delete it: the next start of the training writes another."


RunState = Literal["running", "stopped", "finished", "failed"]


class Status(TypedDict):
    """status.json."""

    state: RunState
    step: int
    num_updates: int
    reason: NotRequired[str | None]


class StepPointer(TypedDict):
    """The part that latest.json and best.json share: the step, all that is ever followed."""

    step: int


class LatestCheckpoint(StepPointer):
    """latest.json."""

    path: str
    """Relative to the run directory."""


class BestEvaluation(StepPointer):
    """best.json."""

    dev_accuracy: float
    temperature: float


class OriginSource(TypedDict):
    """The facts that name the origin of a run with `train.init_from` for good."""

    kind: Literal["run", "export"]
    step: int
    hash: str


class OriginFacts(OriginSource):
    """origin.json: where a run with `train.init_from` comes from, and what it took over."""

    path: str
    frozen_path: str | None
    """Folder or hub id of a backbone that was never trained and lies outside of the origin."""
    head: str | None
    """Class name; None for a fresh head."""
    users: int
    """Number of users whose logits were taken over."""


class RunDirectory:
    """Names and small files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = at_home(path)
        self.checkpoints = self.path / "checkpoints"
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.base = self.path / "base"
        """Weights of a backbone built from `backbone.architecture`, written once."""
        self.init = self.path / "init"
        """Weights, head and users of another run, from which one with `train.init_from` starts; written once."""
        self.origin_file = self.init / "origin.json"
        self.eval = self.path / "eval"
        self.trackers_file = self.path / "trackers.json"
        """Ids under which trackers know this run."""

    def write_config(self, recipe: str) -> None:
        """Write the resolved recipe (YAML) as config.yaml. Raises StorageError where it cannot be written."""
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_file, recipe)

    def write_installation(self, facts: Mapping[str, str | None]) -> None:
        """Write installation.json: commit, versions and time of the newest start. Raises StorageError."""
        write_json(self.path / "installation.json", facts)

    def installation(self) -> dict[str, str | None]:
        """Read installation.json; empty where an earlier version trained the run."""
        return self._names_of("installation.json")

    def write_status(self, facts: Status) -> None:
        """Write status.json. Raises StorageError where it cannot be written."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "status.json", facts)

    def tracker_ids(self) -> dict[str, str]:
        """Read trackers.json; empty where there is none."""
        return self._names_of(self.trackers_file.name)

    def _names_of(self, name: str) -> dict[str, Any]:
        """Read a file of texts by name; empty where there is none. Raises UserError where it is damaged."""
        path = self.path / name
        if not path.is_file():
            return {}
        remedy = "Delete it: the next start writes another."
        return cast(
            "dict[str, Any]", read_object(path, "record of a run", remedy, dict[str, str | None])
        )

    def status(self) -> Status | None:
        """Read status.json; None where there is none."""
        path = self.path / "status.json"
        if not path.is_file():
            return None
        return cast(Status, read_object(path, "status of a run", _DELETE, Status))

    def discard_temporaries(self) -> None:
        """Delete what killed writers of small files left; nobody but evaluations may be writing."""
        for path in self.path.glob("*.tmp-*-*"):
            if path.is_dir():  # half of `base` or `init`, perhaps of another host
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for path in self.eval.glob("*.tmp-*-*"):
            # Evaluations need no lock: one may be at work on a young file right now.
            if time.time() - path.lstat().st_mtime > SECONDS_TO_EVALUATE:
                path.unlink(missing_ok=True)

    def require_run(self) -> None:
        """Raise UserError where no run lies here."""
        if not self.config_file.is_file():
            raise UserError(
                f"{self.path}: no config.yaml here. --run_dir names a directory that `train` wrote."
            )

    def initial_backbone(self) -> str:
        """Return where the backbone that `train.init_from` gave lies. Raises UserError as `origin_facts` does."""
        return self.origin_facts()["frozen_path"] or str(self.init / "backbone")

    def origin_facts(self) -> OriginFacts:
        """Read origin.json of a run with `train.init_from`. Raises UserError where D/init is missing."""
        if not self.origin_file.is_file():
            raise UserError(
                f"{self.init}: missing. A run with train.init_from keeps there what it started from, and `train` "
                "writes it: bring the folder back, or start in another --run_dir."
            )
        remedy = "Bring D/init back from a copy, or start in another --run_dir."
        return cast(
            OriginFacts, read_object(self.origin_file, "origin of a run", remedy, OriginFacts)
        )

    def has_checkpoints(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("step_*"))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def complete_steps(self) -> list[int]:
        """Return the steps with a manifest, ascending; whether it is true is not looked at."""
        return [s for s in self.all_steps() if (self.checkpoint(s) / "manifest.json").is_file()]

    def all_steps(self) -> list[int]:
        """Return the numbers of all directories that are named as a step, ascending.

        Those that are being written or deleted, or that were not named by us, are none.
        """
        numbers = (
            p.name.removeprefix("step_") for p in self.checkpoints.glob("step_*") if p.is_dir()
        )
        return sorted(int(n) for n in numbers if n.isdecimal() and n == f"{int(n):08d}")

    def pointer(self, name: Literal["latest", "best"]) -> StepPointer | None:
        """Return the content of latest.json or best.json, or None; of it only the step is ever followed.

        Raises:
            UserError: it is no JSON with a step.
        """
        path = self.path / f"{name}.json"
        if not path.is_file():
            return None
        remedy = "Delete it; --step takes a number, too."
        content = cast(StepPointer, read_object(path, "name of a step", remedy, StepPointer))
        if content["step"] < 0:
            raise UserError(f"{path}: names no step. {remedy}")
        return content

    def resolve_step(self, step: str) -> int:
        """Return the step number of "latest", "best" or a number.

        Raises:
            UserError: there is no such checkpoint; the message lists those there are.
        """
        steps = self.complete_steps()
        if not steps:
            raise UserError(
                f"{self.checkpoints}: no complete checkpoint. Train first, or check --run_dir."
            )
        if step == "latest":
            named, newest = self.pointer("latest"), steps[-1]
            if named is not None and named["step"] > newest:
                missing = (
                    f"latest.json names step {named['step']}, of which there is no whole checkpoint"
                )
                logger.warning("%s: %s; taking step %d", self.path, missing, newest)
            return newest
        if step == "best":
            best = self.pointer("best")
            if best is None:
                raise UserError(
                    f"{self.path}: no best.json, the run has not evaluated on dev yet. Use --step latest."
                )
            if best["step"] not in steps:
                raise UserError(
                    f"{self.path / 'best.json'}: names step {best['step']}, there are {steps}. Use --step N or latest."
                )
            return int(best["step"])
        if not step.isdigit() or int(step) not in steps:
            raise UserError(
                f"--step {step}: not among the checkpoints of {self.path}: {steps}, latest or best."
            )
        return int(step)

    def append_metrics(self, row: MetricsRow) -> None:
        """Add a line to metrics.jsonl. Raises StorageError where it cannot be written."""
        with writing(self.metrics_file):
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.metrics_file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                os.fsync(stream.fileno())

    def read_metrics(self) -> list[MetricsRow]:
        """Return the lines of metrics.jsonl; one that is torn or not ours is passed over with a warning."""
        if not self.metrics_file.is_file():
            return []
        # What follows the last newline was torn by a kill; the step it tells of is made again.
        *lines, _ = self.metrics_file.read_text(errors="replace").split("\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict) and type(row.get("step")) is int:
                rows.append(row)
            else:
                logger.warning("%s:%d: no line of ours; passed over", self.metrics_file, number)
        return rows

    def drop_metrics_after(self, step: int, *, owes_evaluation: bool = False) -> None:
        """Delete the lines of steps after `step`: a resumed run writes those after its checkpoint again.

        With `owes_evaluation` those of an evaluation at `step` go too, as it will be made again.
        """

        def stays(row: MetricsRow) -> bool:
            again = owes_evaluation and row["step"] == step and "loss" not in row
            return row["step"] <= step and not again

        if self.metrics_file.is_file():
            kept = [json.dumps(row) for row in self.read_metrics() if stays(row)]
            write_atomically(self.metrics_file, "".join(line + "\n" for line in kept))
