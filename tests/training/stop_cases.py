"""Trainings that are asked to stop before their first update, for test_early_stops."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from pal_ds.runs.run_dir import RunDirectory
from tests.engine.kills import command, make_place
from tests.warm import fork_ranks, wait_for


def stopped_at(folder: str, moment: str, number: int, rank: int, times: int) -> dict[str, Any]:
    """A training of two ranks, one of which gets a signal `times` times when it reaches a moment; then once more."""
    place = Path(folder)
    recipe = make_place(place) if not (place / "recipe.yaml").is_file() else place / "recipe.yaml"
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
