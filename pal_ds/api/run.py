"""A run, and what its functions share: records from memory or a file, and errors as the commands word them."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pal_ds.errors import storage_error
from pal_ds.runs.run_dir import RunDirectory

Records = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A JSONL file, or its lines as dicts."""


@dataclass(frozen=True)
class Run:
    """A trained run at one of its steps; every function that takes a run takes its path as well."""

    path: Path
    step: str | int = "latest"
    """A number, `latest` or `best`."""
    trust_checkpoint: bool = False
    """Read checkpoints, and execute code, that another user of the machine may have written."""

    def __post_init__(self) -> None:
        """Takes a path of any kind."""
        object.__setattr__(self, "path", Path(self.path))

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def status(self) -> dict[str, Any]:
        """How the training stands: `state` (finished, stopped, failed), `step` and `num_updates`."""
        return dict(RunDirectory(self.path).status() or {})

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: training figures by `loss`, evaluations by `dev_accuracy`."""
        lines = RunDirectory(self.path).metrics_file.read_text().splitlines()
        return [json.loads(line) for line in lines]

    def users(self) -> dict[str, list[float] | None]:
        """Each user's point s_u, K numbers, by user id; None where a head knows users by their comparisons alone."""
        from pal_ds.inference.list_users import list_users

        with for_people():
            return dict(list_users(RunDirectory(self.path), str(self.step)))


AnyRun = str | os.PathLike[str] | Run


def run_of(run: AnyRun) -> Run:
    """A run by its path or as it is."""
    return run if isinstance(run, Run) else Run(Path(run))


@contextlib.contextmanager
def for_people() -> Iterator[None]:
    """A failed write or read is raised as the commands word it."""
    try:
        yield
    except OSError as error:
        worded = storage_error(error)
        if worded is None:
            raise
        raise worded from error


@contextlib.contextmanager
def as_file(records: Records | None) -> Iterator[Path | None]:
    """The JSONL file of some records, written for the length of the block where they are in memory."""
    if records is None or isinstance(records, str | os.PathLike):
        yield None if records is None else Path(records)
        return
    with tempfile.TemporaryDirectory(prefix="pal_ds_") as folder:
        file = Path(folder, "records.jsonl")
        file.write_text("".join(json.dumps(dict(record)) + "\n" for record in records))
        yield file
