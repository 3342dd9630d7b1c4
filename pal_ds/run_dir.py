"""The run directory: resolved config, metrics, pointers, base weights. Rank 0 writes, everyone reads.

D/config.yaml  D/metrics.jsonl  D/checkpoints/step_N/  D/latest.json  D/best.json  D/base/  D/eval/NAME.json
"""

import json
import os
from pathlib import Path
from typing import Any

from pal_ds.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """The file holds the old text or the new one, never a part: write beside it, fsync, rename."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    """`write_atomically` of an indented JSON."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


class RunDirectory:
    """Names and small files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.config_file = self.path / "config.yaml"
        self.metrics_file = self.path / "metrics.jsonl"
        self.base = self.path / "base"
        """Weights of a backbone built from `backbone.architecture`, written once."""
        self.eval = self.path / "eval"

    def write_config(self, recipe: str) -> None:
        """The resolved recipe (YAML) as config.yaml."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.config_file, recipe)

    def require_run(self) -> None:
        """Raises UserError where no run lies here."""
        if not self.config_file.is_file():
            raise UserError(
                f"{self.path}: no config.yaml here. --run_dir names a directory that `train` wrote."
            )

    def has_checkpoints(self) -> bool:
        return self.checkpoints.is_dir() and any(self.checkpoints.glob("step_*"))

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def complete_steps(self) -> list[int]:
        """Steps with a manifest, ascending. A directory that still ends in .tmp was interrupted."""
        found = (
            path for path in self.checkpoints.glob("step_*") if (path / "manifest.json").is_file()
        )
        return sorted(
            int(path.name.removeprefix("step_"))
            for path in found
            if path.name.removeprefix("step_").isdigit()
        )

    def pointer(self, name: str) -> dict[str, Any] | None:
        """The content of latest.json or best.json."""
        path = self.path / f"{name}.json"
        try:
            return json.loads(path.read_text()) if path.is_file() else None
        except ValueError as error:
            raise UserError(
                f"{path}: not valid JSON ({error}). Delete it; --step takes a number, too."
            ) from None

    def resolve_step(self, step: str) -> int:
        """Step number of "latest", "best" or a number.

        Raises:
            UserError: there is no such checkpoint; the message lists those there are.
        """
        steps = self.complete_steps()
        if not steps:
            raise UserError(
                f"{self.checkpoints}: no complete checkpoint. Train first, or check --run_dir."
            )
        if step == "latest":
            return steps[-1]
        if step == "best":
            best = self.pointer("best")
            if best is None:
                raise UserError(
                    f"{self.path}: no best.json, the run has not evaluated on dev yet. Use --step latest."
                )
            return int(best["step"])
        if not step.isdigit() or int(step) not in steps:
            raise UserError(
                f"--step {step}: not among the checkpoints of {self.path}: {steps}, latest or best."
            )
        return int(step)

    def append_metrics(self, row: dict[str, Any]) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.metrics_file, "a") as stream:
            stream.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics_file.is_file():
            return []
        # A line without its newline was torn by a kill; the step it tells of is made again.
        lines = self.metrics_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def drop_metrics_after(self, step: int) -> None:
        """A resumed run writes the steps after its checkpoint again; the lines of the abandoned ones go."""
        if self.metrics_file.is_file():
            kept = [json.dumps(row) for row in self.read_metrics() if row["step"] <= step]
            write_atomically(self.metrics_file, "".join(line + "\n" for line in kept))
