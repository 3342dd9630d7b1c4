"""Commands that meet a limit of the machine, forked for test_limits: what they say and how they end."""

import contextlib
import importlib
import os
import resource
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.engine.kills import command
from tests.warm import LAUNCHER_VARIABLES, Hook, fork_ranks, wait_for


def few_handles(spare: int) -> None:
    """From now on this process may open so many files more."""
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, used + spare))


def little_memory(spare: int) -> None:
    """From now on this process may take so many MiB more of address space."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + (spare << 20)
    held, ballast = bytearray(spare << 20), []
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # What the parent freed still lies in the heap, and would be given out beyond the limit.
    with contextlib.suppress(MemoryError):
        while True:
            ballast.append(bytearray(1 << 16))
    del held
    _KEPT.extend(ballast)


_KEPT: list[bytearray] = []


LIMITS: dict[str, Callable[[int], None]] = {"handles": few_handles, "memory": little_memory}


def under_limit(words: list[str], limit: str, spare: int) -> tuple[int, str]:
    """Exit status and output of a command without a launcher, under a limit where one is named."""
    work = command(*words)

    def alone() -> None:
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name)
        if limit:
            # Python may lose a MemoryError amid an import (SystemError: error return without exception set).
            importlib.import_module("pal_ds.eval.report")
            LIMITS[limit](spare)
        work()

    ((code, said),) = _outcomes(1, alone)
    return code, said


def without_a_rank(words: list[str]) -> list[tuple[int, str]]:
    """Exit status and output of two ranks, the second of which is stopped as it starts."""

    def hook(rank: int, moment: str) -> None:
        if (rank, moment) == (1, "start"):
            os.kill(os.getpid(), signal.SIGSTOP)

    return _outcomes(2, command(*words), hook, grace=1)


def come_late(words: list[str]) -> list[tuple[int, str]]:
    """Exit status and output of three ranks: the last dies as soon as it has come, the second comes seconds later."""

    def hook(rank: int, moment: str) -> None:
        if (rank, moment) == (1, "start"):
            time.sleep(4)
        if (rank, moment) == (2, "update: prepare"):
            os.kill(os.getpid(), signal.SIGKILL)

    return _outcomes(3, command(*words), hook, grace=40)


def on_a_port_that_is_taken(words: list[str], num_ranks: int) -> list[tuple[int, str]]:
    """Exit status and output of so many ranks, where another program listens at their port."""
    work = command(*words)

    def beside_another() -> None:
        with contextlib.ExitStack() as held:
            if os.environ["RANK"] == "0":
                listener = held.enter_context(socket.socket())
                listener.bind(("", int(os.environ["MASTER_PORT"])))
                listener.listen()
            work()

    return _outcomes(num_ranks, beside_another)


def _outcomes(
    num_ranks: int, work: Callable[[], None], hook: Hook | None = None, grace: float = 6
) -> list[tuple[int, str]]:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        ranks = fork_ranks(num_ranks, work, log, hook)
        codes = wait_for(ranks, seconds=60, grace=grace)
        said = [Path(f"{log}.{rank.number}").read_text() for rank in ranks]
    return list(zip(codes, said, strict=True))
