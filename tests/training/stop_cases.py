"""Trainings that are asked to stop before their first update, for test_early_stops."""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from pal_ds.runs.run_dir import RunDirectory
from tests.engine.kills import command, make_place
from tests.warm import fork_ranks, wait_for


def _recipe_in(folder: str) -> Path:
    recipe = Path(folder) / "recipe.yaml"
    return recipe if recipe.is_file() else make_place(Path(folder))


def stuck_in_native_code() -> None:
    """Never returns, and lets other threads run: a lock of C is taken twice, which no signal breaks off."""
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def interrupted_in_native_code(folder: str, num_ranks: int) -> list[tuple[int, str]]:
    """Exit status and output of ranks, the first of which gets two Ctrl-Cs while it is stuck in native code."""
    place, recipe = Path(folder), _recipe_in(folder)
    run = place / f"native_{num_ranks}"
    train, log = command("train", f"--config={recipe}", f"--run_dir={run}"), Path(f"{run}.log")

    def interrupt_twice() -> None:
        for _ in range(2):
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)

    def hook(rank: int, reached: str) -> None:
        if (rank, reached) == (0, "update: load weights"):
            threading.Thread(target=interrupt_twice, daemon=True).start()
            stuck_in_native_code()

    codes = wait_for(fork_ranks(num_ranks, train, log, hook), seconds=40, grace=20)
    said = [Path(f"{log}.{rank}").read_text() for rank in range(num_ranks)]
    return list(zip(codes, said, strict=True))


def stopped_at(folder: str, moment: str, number: int, rank: int, times: int) -> dict[str, Any]:
    """A training of two ranks, one of which gets a signal `times` times when it reaches a moment; then once more."""
    place, recipe = Path(folder), _recipe_in(folder)
    name = f"{moment.split()[-1]}_{number}_{rank}_{times}"
    words = (f"--config={recipe}", f"--run_dir={place / name}", f"--data.path={place / name}_data")
    train, log = command("train", *words), place / f"{name}.log"

    def hook(reached_by: int, reached: str) -> None:
        if (reached_by, reached) == (rank, moment):
            for _ in range(times):
                os.kill(os.getpid(), number)

    # Under nohup a closed terminal means nothing, and ranks inherit that.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    begin = time.monotonic()
    codes = wait_for(fork_ranks(2, train, log, hook), seconds=60, grace=20)
    run = RunDirectory(place / name)
    return {
        "codes": codes,
        "seconds": time.monotonic() - begin,
        "status": run.status(),
        "left": sorted(path.name for path in place.glob(f"{name}_data*")),
        "again": wait_for(fork_ranks(2, train, log), seconds=60, grace=20),
        "status_again": run.status(),
        "said": "".join(Path(f"{log}.{one}").read_text() for one in (0, 1)),
    }
