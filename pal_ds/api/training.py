"""`prepare`, `train` and `evaluate` from Python."""

import contextlib
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pal_ds.api.run import AnyRun, Records, Run, as_file, for_people, run_of
from pal_ds.config.recipe import Recipe, read
from pal_ds.data.prepare import prepare as prepare_data
from pal_ds.data.tables import PreparedData
from pal_ds.runs.run_dir import RunDirectory


def prepare(recipe: Recipe, **overrides: Any) -> PreparedData:
    """Turns raw comparisons into tables, users and splits at `data.path`; reuses those made with the same settings.

    Args:
        recipe: as for `train`; it need not name a head.
        overrides: dotted keys of the recipe and their values.

    Returns:
        The prepared tables, memory-mapped: `users`, `comparisons`, `rows("test")`, and `info` with counts and
        dropped rows by reason.

    Raises:
        UserError: a key that no recipe has, or records that cannot be read.
    """
    with for_people():
        config, _ = read(recipe, overrides, require_head=False)
        prepare_data(config.data, quiet=True)
        return PreparedData.open(config.data.path)


def train(
    recipe: Recipe,
    run_dir: str | os.PathLike[str],
    *,
    fresh: bool = False,
    allow_change: Sequence[str] = (),
    trust_checkpoint: bool = False,
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
        overrides: dotted keys of the recipe and their values: `**{"optim.learning_rate": 1e-3}`, `head=MyHead`.

    Returns:
        The run, which may have been stopped before its end (`status`).

    Raises:
        UserError: a key that no recipe has, keys that contradict each other or the data, a run that was started with
            other values, or updates that could not be made (NumericError).
    """
    from pal_ds.distributed.preemption import listening
    from pal_ds.training.launch import launch_training

    with for_people(), contextlib.ExitStack() as held:
        config, text = read(recipe, overrides)
        if "RANK" not in os.environ:
            # The watchdog ends processes that hang; alone there is nobody to wait for, and a notebook lives on.
            config = replace(config, train=replace(config.train, hang_minutes=0))
        if threading.current_thread() is threading.main_thread():
            held.enter_context(listening(config.train.stop_signals))
        launch_training(
            config,
            text,
            Path(run_dir),
            fresh=fresh,
            allow_change=list(allow_change),
            trust_checkpoint=trust_checkpoint,
        )
        return Run(Path(run_dir), trust_checkpoint=trust_checkpoint)


def evaluate(
    run: AnyRun,
    *,
    split: str = "test",
    data: Records | None = None,
    name: str | None = None,
    users: str | os.PathLike[str] | None = None,
    best_of_n: bool = False,
) -> dict[str, Any]:
    """Accuracy per user, exact at any number of ranks; also written to RUN/eval/NAME.json.

    Args:
        run: what to evaluate.
        split: split of the run's data: `test`, `dev`, `train`, `unseen_train`, ...
        data: comparisons in place of a split.
        name: of the result; unset, the split, the file's stem, or `records` for comparisons in memory.
        users: new users that `adapt` fitted, beside or in place of the run's own.
        best_of_n: choosing among candidates instead: lines of `responses` and `scores`.

    Returns:
        The figures of eval/NAME.json: `pairs`, `accuracy`, `accuracy_ci95`, `ece`, `users` by id, ...

    Raises:
        UserError: no such run, step or split, or comparisons that cannot be read.
    """
    from pal_ds.config.run_config import TrainConfig
    from pal_ds.distributed.watchdog import watch
    from pal_ds.engine.process_group import joined_or_alone
    from pal_ds.eval.best_of_n import NAME_PREFIX, rank_set
    from pal_ds.eval.evaluate import evaluate_set
    from pal_ds.eval.requests import eval_requests
    from pal_ds.inference.load_run import restore
    from pal_ds.inference.readers import known_users

    where = run_of(run)
    directory, table = RunDirectory(where.path), None if users is None else Path(users)
    with for_people(), as_file(data) as file, joined_or_alone() as world:
        if file is not None and not isinstance(data, str | os.PathLike):
            name = name or "records"
        files = [] if file is None else [file]
        (request,) = eval_requests(split, files, name, NAME_PREFIX if best_of_n else "")
        # Alone it waits for nobody.
        minutes = TrainConfig.hang_minutes if world.world_size > 1 else 0
        with watch(world, directory.path / "stacks", minutes):
            trust = where.trust_checkpoint
            restored = restore(directory, where.step, world.device, trust=trust)
            measure = rank_set if best_of_n else evaluate_set
            return dict(measure(restored, known_users(restored, table), request, world))
