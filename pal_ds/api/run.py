"""A run and how it comes to be, from Python; records from memory or a file, and errors as the commands word them."""

import contextlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal_ds.config.recipe import Recipe, asks_for_code, read
from pal_ds.data.prepare import prepare as prepare_data
from pal_ds.data.tables import PreparedData
from pal_ds.errors import UserError, mendable
from pal_ds.io.files import at_home
from pal_ds.modeling.lengths import data_to_prepare
from pal_ds.runs.run_dir import RunDirectory

if TYPE_CHECKING:
    from pal_ds.data.sources import Source

Records = str | os.PathLike[str] | Iterable[Mapping[str, Any]]
"""A JSONL file, or its lines as dicts."""


@dataclass(frozen=True)
class Run:
    """A trained run at one of its steps; every function that takes a run takes its path as well."""

    path: Path
    step: str | int = "latest"
    """A number, `latest` or `best`."""
    trust_checkpoint: bool = False
    """Read what another user of the machine, or anyone, may have written."""
    trust_code: bool = False
    """Import the classes that the run names beyond pal_ds's own, and run code that its backbone brings."""

    def __post_init__(self) -> None:
        """Takes a path of any kind."""
        object.__setattr__(self, "path", at_home(self.path))

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
        from pal_ds.inference.mixtures import list_users

        with for_people():
            lines = list_users(RunDirectory(self.path), str(self.step), **self.leave)
        return {line["user_id"]: line["mixture"] for line in lines}

    @property
    def leave(self) -> dict[str, bool]:
        """The two kinds of trust, as the functions take them that open a run."""
        return {"trust": self.trust_checkpoint, "trust_code": self.trust_code}


AnyRun = str | os.PathLike[str] | Run


def run_of(run: AnyRun) -> Run:
    """A run by its path or as it is."""
    return run if isinstance(run, Run) else Run(Path(run))


_LONGEST_NAME = 255
"""Bytes of a file's name."""
_OPTION = re.compile(r"`[^`]*`|(?<!\S)--(?=[a-z_]+\b(?! on the command line))")
"""An option in the text of a message; one in backticks, or said to be of the command line, stays."""


@contextlib.contextmanager
def for_people() -> Iterator[None]:
    """A failed write or read is raised as the commands word it; an option of theirs goes by the argument's name.

    What is written meanwhile is not for everyone to change, whatever the process's umask: readers refuse such a run.
    """
    umask = os.umask(0o022)
    os.umask(umask | 0o002)
    try:
        yield
    except UserError as error:
        error.args = (_OPTION.sub(lambda found: found[0].removeprefix("--"), str(error)),)
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        worded = mendable(error)
        if worded is None:
            raise
        raise worded from error
    finally:
        os.umask(umask)


def path_or_list(records: Records, name: str) -> Path | list[Mapping[str, Any]]:
    """The path, or the list, of some records that a function was given as its argument `name`.

    Raises:
        UserError: they are neither a path nor several records.
    """
    if isinstance(records, str | os.PathLike):
        path = at_home(records)
        if isinstance(records, str) and (records.lstrip()[:1] in ("{", "[") or "\n" in records):
            raise UserError(
                f"{name}: is a text of JSON. Give a list of dicts, or the path of a file."
            )
        if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
            raise UserError(f"{name}: no path is so long: {str(path)[:40]}...")
        return path
    if hasattr(records, "columns"):
        kind = type(records).__name__
        raise UserError(
            f"{name}: is a {kind}; give a list of dicts (of pandas: {name}.to_dict('records')), or the path of a file."
        )
    if isinstance(records, Mapping) or not isinstance(records, Iterable):
        raise UserError(
            f"{name}: is of type {type(records).__name__}; give a list of dicts, or the path of a file."
        )
    return list(records)


def as_pairs(records: Records | None, name: str) -> "Path | Source | None":
    """The file, or the source, of some comparisons; UserError as `path_or_list` raises it."""
    from pal_ds.data.sources.given import GivenRecords

    of_caller = None if records is None else path_or_list(records, name)
    return GivenRecords(of_caller) if isinstance(of_caller, list) else of_caller


def prepare(
    recipe: Recipe, *, again: bool = False, trust_code: bool = False, **overrides: Any
) -> PreparedData:
    """Turns raw comparisons into tables, users and splits at `data.path`; reuses those made with the same settings.

    Args:
        recipe: as for `train`; it need not name a head.
        again: replace what other settings made there.
        trust_code: as for `train`.
        overrides: dotted keys of the recipe and their values.

    Returns:
        The prepared tables, memory-mapped: `users`, `comparisons`, `rows("test")`, and `info` with counts and
        dropped rows by reason.

    Raises:
        UserError: a key that no recipe has, or records that cannot be read.
    """
    with for_people():
        config, _ = read(recipe, overrides, require_head=False, trust_code=trust_code)
        prepare_data(data_to_prepare(config), quiet=True, again=again)
        return PreparedData.open(config.data.path)


def train(
    recipe: Recipe,
    run_dir: str | os.PathLike[str],
    *,
    fresh: bool = False,
    allow_change: Sequence[str] = (),
    trust_checkpoint: bool = False,
    trust_code: bool = False,
    **overrides: Any,
) -> Run:
    """Prepares the data and trains; resumes where `run_dir` holds checkpoints.

    Args:
        recipe: a YAML file, the name of a shipped recipe, a dict of the same keys, a RunConfig, or a list of these, in
            which later ones win. Values may be config dataclasses (`OptimConfig(...)`), a class of `Head`, `Source` or
            `MarginLoss` from a module of one's own, or `functools.partial` of one with its arguments.
        run_dir: directory of the run.
        fresh: refuse a directory that is not empty.
        allow_change: keys that may differ from those the run was started with.
        trust_checkpoint: read checkpoints of another owner.
        trust_code: import classes that a recipe file names beyond pal_ds's own, and run code of a model's or a
            tokenizer's folder where it asks for that. What this call itself says needs no such leave.
        overrides: dotted keys of the recipe and their values: `**{"optim.learning_rate": 1e-3}`, `head=MyHead`.

    Returns:
        The run, which may have been stopped before its end (`status`).

    Raises:
        UserError: a key that no recipe has, keys that contradict each other or the data, a run that was started with
            other values, or updates that could not be made (NumericError).
    """
    from pal_ds.config.changes import refuse_unknown_keys
    from pal_ds.distributed.preemption import listening
    from pal_ds.training.launch import launch_training

    with for_people(), contextlib.ExitStack() as held:
        config, text = read(recipe, overrides, trust_code=trust_code)
        refuse_unknown_keys(allow_change, text)
        if "RANK" not in os.environ:
            # The watchdog ends processes that hang; alone there is nobody to wait for, and a notebook lives on.
            config = replace(config, train=replace(config.train, hang_minutes=0))
        if threading.current_thread() is threading.main_thread():
            launched = "RANK" in os.environ
            held.enter_context(listening(config.train.stop_signals, may_end_process=launched))
        launch_training(
            config,
            text,
            at_home(run_dir),
            fresh=fresh,
            allow_change=list(allow_change),
            trust_checkpoint=trust_checkpoint,
            trust_code=trust_code,
        )
        # What was allowed here is allowed to whoever uses the run that it gave.
        own = trust_code or asks_for_code(text)
        return Run(at_home(run_dir), trust_checkpoint=trust_checkpoint, trust_code=own)
