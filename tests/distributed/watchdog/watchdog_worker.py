"""Mishaps under the watchdog, each in a small job of gloo ranks; prints one JSON with how every rank ended.

Ranks are forked from here, so that torch is imported once for all of them, and plain processes, because torchrun
would end the others itself as soon as one has ended.
"""

import ctypes
import io
import json
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from pal_ds.distributed import phase
from pal_ds.distributed.watchdog import coordinator, watch
from pal_ds.distributed.world import World, leave
from pal_ds.engine.checkpoint import shard_writer
from pal_ds.errors import StorageError, UserError

HANG_SECONDS = 4.0
JOBS_AT_ONCE = 6
NUM_UPDATES = 4
MISHAP_AT = 2
GIVE_UP_SECONDS = 45
TOKEN = "feed" * 8
"""Of every job here, to look for it where it must not be."""

Act = Callable[[Path], object]


def sleep_in_collate(_: Path) -> None:
    time.sleep(1000)


def sleep_in_forward(_: Path) -> None:
    time.sleep(1000)


def keep_the_interpreter(_: Path) -> None:
    """Native code that never lets another thread run."""
    ctypes.PyDLL(None).sleep(1000)


def raise_value_error(_: Path) -> None:
    raise ValueError("a bug of one rank")


def raise_storage_error(_: Path) -> None:
    raise StorageError("/full: no space left")


def raise_user_error(_: Path) -> None:
    raise UserError("the data are bad")


def interrupt(_: Path) -> None:
    raise KeyboardInterrupt


def die(_: Path) -> None:
    # A child as a data loader forks it: it inherits the connections of the rank.
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def stop(_: Path) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(HANG_SECONDS / 4)  # with the time before the stop, still less than a hang


def work_long_in_steps(_: Path) -> None:
    for part in range(10):
        phase.enter(f"part {part}")
        time.sleep(HANG_SECONDS / 5)


class SlowDisk:
    """A file each of whose writes takes long."""

    def __init__(self, path: str, write: Callable[[int], None]) -> None:
        self.stream, self.write_slowly, self.num_writes = io.FileIO(path, "w"), write, 0
        self.flush, self.fileno = self.stream.flush, self.stream.fileno

    def write(self, data: memoryview) -> None:
        self.num_writes += 1
        self.write_slowly(self.num_writes)
        self.stream.write(data)

    def __enter__(self) -> "SlowDisk":
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()


def save_to(folder: Path, write: Callable[[int], None]) -> None:
    """One tensor, which torch writes at one go."""
    shard_writer.CHUNK = 1 << 10
    shard_writer._classes_in_shards = list
    shard_writer.open = lambda path, _: SlowDisk(path, write)  # type: ignore[attr-defined]
    shards = shard_writer.ShardFiles()
    shards.save(torch.zeros(10 << 8), str(folder / "shard.pt"))
    assert shards.entries(folder)["shard.pt"]["size"] > 10 << 10


def save_slowly(folder: Path) -> None:
    save_to(folder, lambda num_writes: time.sleep(HANG_SECONDS / 8))


def write_for_ever(num_writes: int) -> None:
    time.sleep(0.2 if num_writes < 5 else 1000)


def save_and_hang(folder: Path) -> None:
    save_to(folder, write_for_ever)


# name: (phase of the mishap, ranks it comes to, what happens)
CASES: dict[str, tuple[str, tuple[int, ...], Act]] = {
    "asleep in collate": ("collate", (1,), sleep_in_collate),
    "rank 0 asleep": ("collate", (0,), sleep_in_collate),
    "asleep in forward": ("forward", (2,), sleep_in_forward),
    "asleep, and gloo gives up first": ("collate", (1,), sleep_in_collate),
    "interpreter kept": ("collate", (1,), keep_the_interpreter),
    "one raises": ("collate", (1,), raise_value_error),
    "rank 0 raises": ("collate", (0,), raise_value_error),
    "one cannot write": ("collate", (2,), raise_storage_error),
    "all raise alike": ("collate", (0, 1, 2), raise_user_error),
    "one interrupted": ("collate", (1,), interrupt),
    "one killed": ("collate", (2,), die),
    "rank 0 killed": ("forward", (0,), die),
    "one stopped": ("collate", (1,), stop),
    "rank 0 stopped": ("collate", (0,), stop),
    "all stopped for a while": ("collate", (0, 1, 2), stop),
    "slow and alive": ("collate", (1,), work_long_in_steps),
    "slow save": ("collate", (1,), save_slowly),
    "save that hangs": ("collate", (1,), save_and_hang),
    "nothing": ("collate", (), sleep_in_collate),
}
CONTINUED = {"one stopped", "rank 0 stopped", "all stopped for a while"}
NEVER_ENDS = {"interpreter kept": (1,)}
"""Ranks that no thread of theirs can end; a launcher does."""


def train(world: World, name: str, folder: Path) -> None:
    where, ranks, act = CASES[name]
    for step in range(NUM_UPDATES):
        for part in ("collate", "forward"):
            phase.enter(part, step)
            if step == MISHAP_AT and part == where and world.rank in ranks:
                time.sleep(HANG_SECONDS / 4)  # long enough for a heartbeat to tell the phase
                (folder / f"mishap_{world.rank}").write_text(str(time.time()))
                act(folder)
            if part == "forward":
                dist.all_reduce(torch.ones(4))


def run_rank(name: str, rank: int, num_ranks: int, folder: Path) -> NoReturn:
    output = os.open(folder / f"output_{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    logging.basicConfig(level=logging.DEBUG)
    coordinator.secrets.token_hex = lambda _: TOKEN  # type: ignore[assignment]
    gloo_first = name == "asleep, and gloo gives up first"
    code = 1
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=HANG_SECONDS if gloo_first else 300),
        )
        world = World(rank, num_ranks, torch.device("cpu"))
        minutes = HANG_SECONDS * (20 if gloo_first else 1) / 60
        lost = folder / "lost"
        with watch(world, folder / "stacks", minutes, lost.write_text):
            train(world, name, folder)
        dist.destroy_process_group()
        code = 0
    except UserError as error:
        code = error.exit_code
        if rank == 0 and not getattr(error, "is_printed", False):
            print(f"pal-ds: error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)


class Job:
    """One mishap."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.num_ranks = 3
        self.ended: dict[int, tuple[int, float]] = {}
        self.began = time.time()
        self.to_continue = name in CONTINUED
        self.pids: list[int] = []
        for rank in range(self.num_ranks):
            pid = os.fork()
            if pid == 0:
                run_rank(name, rank, self.num_ranks, folder)
            self.pids.append(pid)

    def mishap_at(self) -> float | None:
        marks = [path.read_text() for path in self.folder.glob("mishap_*")]
        return float(max(marks)) if marks and all(marks) else None

    def step(self) -> bool:
        """Whether all ranks have ended; continues and kills what this mishap asks for."""
        for rank, pid in enumerate(self.pids):
            if rank in self.ended:
                continue
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                self.ended[rank] = (os.waitstatus_to_exitcode(status), time.time())
        left = [rank for rank in range(self.num_ranks) if rank not in self.ended]
        victims = CASES[self.name][1]
        mishap = self.mishap_at()
        if self.to_continue and mishap is not None:
            suspended = set(left) == set(victims) and time.time() - mishap > 2 * HANG_SECONDS
            if suspended:
                for rank in left:
                    os.kill(self.pids[rank], signal.SIGCONT)
                self.to_continue = False
        if left and (
            time.time() - self.began > GIVE_UP_SECONDS
            or left == list(NEVER_ENDS.get(self.name, ()))
        ):
            for rank in left:
                os.kill(self.pids[rank], signal.SIGKILL)
        return not left

    def outcome(self) -> dict[str, Any]:
        mishap = self.mishap_at() or self.began
        ranks = range(self.num_ranks)
        stacks = [self.folder / "stacks" / f"rank_{rank}.txt" for rank in ranks]
        lost = self.folder / "lost"
        return {
            "codes": [self.ended[rank][0] for rank in ranks],
            "seconds": [round(self.ended[rank][1] - mishap, 2) for rank in ranks],
            "output": [(self.folder / f"output_{rank}").read_text() for rank in ranks],
            "stacks": [path.read_text() if path.is_file() else None for path in stacks],
            "leaked": [
                str(path)
                for path in self.folder.rglob("*")
                if path.is_file() and TOKEN.encode() in path.read_bytes()
            ],
            "lost": lost.read_text() if lost.is_file() else None,
        }


def main() -> None:
    names = sys.argv[1:] or list(CASES)
    waiting, running, outcomes = list(names), list[Job](), dict[str, Any]()
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < JOBS_AT_ONCE:
                name = waiting.pop(0)
                place = Path(folder, name.replace(" ", "_"))
                place.mkdir()
                running.append(Job(name, place))
            for job in list(running):
                if job.step():
                    outcomes[job.name] = job.outcome()
                    running.remove(job)
            time.sleep(0.02)
        print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
