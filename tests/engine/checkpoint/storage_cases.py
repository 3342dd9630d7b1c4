"""Runs on a small file system that fills up, turns read-only or refuses one rank, for test_storage."""

import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from pal_ds.engine.checkpoint.verify import verify_checkpoint
from pal_ds.runs.run_dir import RunDirectory
from tests.engine.kills import command, harness_in, make_place, said
from tests.warm import Hook, fork_ranks, wait_for

FILLER = "filler"


def fill(disk: Path, leave: int) -> None:
    """Takes all of a file system but `leave` bytes."""
    free = shutil.disk_usage(disk).free
    with open(disk / FILLER, "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, free - leave)


def at(moment: str, rank: int, occurrence: int, act: Any) -> Hook:
    """A hook that calls `act()` in `rank` when it reaches `moment` for the n-th time."""
    seen = []

    def hook(number: int, name: str) -> None:
        if (number, name) == (rank, moment):
            seen.append(name)
            if len(seen) == occurrence:
                act()

    return hook


def no_file_longer_than(size: int) -> None:
    """From now on the kernel refuses this process longer files, as a quota would."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def start(folder: str, run: Path, hook: Hook | None) -> dict[str, Any]:
    """A start of the tiny recipe, and what it leaves."""
    recipe = harness_in(folder).recipe
    log = Path(folder) / "storage.log"
    train = command("train", f"--config={recipe}", f"--run_dir={run}")
    codes = wait_for(fork_ranks(2, train, log, hook), seconds=120)
    opened = RunDirectory(run)
    intact = [s for s in opened.complete_steps() if verify_checkpoint(opened.checkpoint(s))]
    names = sorted(path.name for path in opened.checkpoints.glob("*"))
    return {
        "codes": codes,
        "said": said(log),
        "intact": intact,
        "names": names,
        "latest": opened.pointer("latest"),
    }


def disk_full(folder: str, disk: str, rank: int) -> list[dict[str, Any]]:
    """The disk fills up while `rank` writes the second checkpoint; then there is room again."""
    run = Path(disk) / "run"
    told = [start(folder, run, at("directory made", rank, 2, lambda: fill(Path(disk), 100_000)))]
    (Path(disk) / FILLER).unlink()
    told.append(start(folder, run, None))
    harness_in(folder).check_same(RunDirectory(run))
    shutil.rmtree(run)
    return told


def one_rank_refused(folder: str, disk: str, rank: int) -> dict[str, Any]:
    """Only one rank cannot write its shard."""
    run = Path(disk) / "run"
    told = start(folder, run, at("directory made", rank, 2, lambda: no_file_longer_than(5000)))
    shutil.rmtree(run)
    return told


def metrics_refused(folder: str, disk: str) -> dict[str, Any]:
    """The disk is full to its last page when the next figures are to be written."""
    run = Path(disk) / "run"

    def fill_up() -> None:
        with open(run / "metrics.jsonl", "ab") as stream:
            stream.write(b"\n" * (-stream.tell() % resource.getpagesize()))
        fill(Path(disk), 0)

    told = start(folder, run, at("update: backward", 0, 3, fill_up))
    (Path(disk) / FILLER).unlink()
    shutil.rmtree(run)
    return told


def read_only(folder: str, disk: str) -> dict[str, Any]:
    """A run is started again after its file system became read-only."""
    run = Path(disk) / "run"
    shutil.copytree(harness_in(folder).whole.path, run)
    shutil.rmtree(run / "checkpoints" / "step_00000008")
    try:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        return start(folder, run, None)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
        shutil.rmtree(run)


def new_run_on_read_only(folder: str, disk: str) -> dict[str, Any]:
    """A first start on a read-only file system."""
    try:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        return start(folder, Path(disk) / "run", None)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", disk], check=True)


def one_rank_raises_unwatched(folder: str) -> dict[str, Any]:
    """Under hang_minutes=0 rank 1 raises in an update, and rank 0 sees no more than its connection end."""
    place = Path(folder) / "unwatched"
    place.mkdir()
    recipe = make_place(place, hang_minutes=0)

    def fail() -> None:
        raise RuntimeError("a bug of one rank")

    log = place / "log"
    train = command("train", f"--config={recipe}", f"--run_dir={place}/run")
    ranks = fork_ranks(2, train, log, at("update: backward", 1, 2, fail))
    codes = wait_for(ranks, seconds=60, grace=20)
    return {"codes": codes, "said": said(log), "status": RunDirectory(place / "run").status()}
