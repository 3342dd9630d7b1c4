"""Worker of test_stop: two ranks are asked to stop in many ways, then start again and finish."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pal_ds.config.run_config import RunConfig
from pal_ds.data.tables import PreparedData
from pal_ds.distributed import phase
from pal_ds.distributed.preemption import listening
from pal_ds.distributed.world import World, leave
from pal_ds.engine.process_group import distributed
from pal_ds.inference.scoring import Forwards
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training import loop
from tests import one_training
from tests.training.resume_worker import recipe

STOP_IN_UPDATE = 3
"""0-based: four updates are made when the run stops."""


def signal_self(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def children() -> list[int]:
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [int(pid) for task in tasks for pid in task.read_text().split()]


def signal_workers(world: World) -> None:
    found = children()
    assert found, "no data-loader worker is running"
    for pid in found:
        os.kill(pid, signal.SIGUSR2)
        os.kill(pid, signal.SIGTERM)
    if world.is_rank_zero:
        signal_self(signal.SIGUSR2)


def run_out_of_time(world: World) -> None:
    """Rank 0's clock says that a minute less two seconds has gone by: a save in doubt takes three."""
    if world.is_rank_zero:
        phase.STARTED = time.monotonic() - 58


IN_UPDATE: dict[str, Callable[[World], None]] = {
    "one_rank": lambda world: signal_self(signal.SIGUSR2) if world.rank == 1 else None,
    "twice": lambda world: signal_self(signal.SIGTERM, signal.SIGUSR2),
    "keyboard": lambda world: signal_self(signal.SIGINT, signal.SIGHUP),
    "workers": signal_workers,
    "due": lambda world: signal_self(signal.SIGUSR2) if world.rank == 0 else None,
    "clock": run_out_of_time,
    "evaluating": lambda world: None,
}


def settings_of(name: str) -> dict[str, Any]:
    """Evaluations fall due at updates 4 and 8 where the stop is to meet one."""
    every = {"due": 4, "evaluating": 4}.get(name, 100)
    return {
        "save_every": 100,
        "eval_every": every,
        # Stops fall between two lines of the metrics.
        "log_every": 3,
        "num_workers": int(name == "workers"),
        "time_limit_minutes": 1.0 if name == "clock" else None,
    }


def with_settings(config: RunConfig, **settings: Any) -> RunConfig:
    return replace(config, train=replace(config.train, **settings))


def stopped_run(
    name: str, config: RunConfig, folder: Path, data: PreparedData, world: World
) -> None:
    """The first start of a scenario; what this rank saved goes to saves_RANK.json."""
    make_update, save, margins = loop.make_update, loop.save, Forwards.margins
    saves: list[int] = []

    def disturbed_update(state: Any, *arguments: Any) -> Any:
        if state.step == STOP_IN_UPDATE:
            IN_UPDATE[name](world)
        return make_update(state, *arguments)

    def recorded_save(state: Any) -> None:
        if name == "twice":
            signal_self(signal.SIGUSR2)
        saves.append(state.step)
        save(state)

    def disturbed_margins(*arguments: Any, **options: Any) -> Any:
        if name == "evaluating" and world.rank == 1:
            signal_self(signal.SIGUSR2)
        return margins(*arguments, **options)

    loop.make_update, loop.save = disturbed_update, recorded_save
    Forwards.margins = disturbed_margins  # type: ignore[method-assign]
    phase.STARTED = time.monotonic()
    try:
        with listening(config.train.stop_signals):
            one_training.train(config, RunDirectory(folder), data, world)
    finally:
        loop.make_update, loop.save = make_update, save
        Forwards.margins = margins  # type: ignore[method-assign]
    (folder / f"saves_{world.rank}.json").write_text(json.dumps(saves))


def main(data_path: str, base: str, out: str) -> None:
    data = PreparedData.open(data_path)
    config = recipe(data_path, base, "full")
    with distributed() as world:
        for every in (4, 100):
            whole = with_settings(config, **settings_of("due" if every == 4 else "one_rank"))
            one_training.train(whole, RunDirectory(Path(out) / f"whole_{every}"), data, world)
        for name in IN_UPDATE:
            folder = Path(out) / name
            settings = settings_of(name)
            stopped_run(name, with_settings(config, **settings), folder, data, world)
            world.barrier()
            if world.is_rank_zero:
                (folder / "first_status.json").write_text((folder / "status.json").read_text())
                steps = RunDirectory(folder).complete_steps()
                (folder / "first_steps.json").write_text(json.dumps(steps))
            world.barrier()
            settings["time_limit_minutes"] = None
            one_training.train(with_settings(config, **settings), RunDirectory(folder), data, world)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
