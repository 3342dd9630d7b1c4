"""Commands that meet a limit of the machine, forked for test_limits: what they say, how they end, what they leave."""

import os
import resource
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.warm import LAUNCHER_VARIABLES, fork_ranks, wait_for

MEBIBYTE = 2**20


def few_handles(spare: int) -> None:
    """From now on this process may open so many files more."""
    used = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, used + spare))


def little_memory(spare: int) -> None:
    """From now on this process may take so many MiB more of address space."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = used + spare * MEBIBYTE
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


LIMITS: dict[str, Callable[[int], None]] = {"handles": few_handles, "memory": little_memory}


def outcome(words: list[str], limit: str, spare: int, num_ranks: int) -> list[tuple[int, str]]:
    """Exit status and output of each rank of `pal-ds WORDS`, under a limit where one is named; 0: no launcher."""

    def work() -> None:
        if num_ranks == 0:
            for name in LAUNCHER_VARIABLES:
                os.environ.pop(name)
        if limit:
            LIMITS[limit](spare)
        sys.argv = ["pal_ds", *words]
        runpy.run_module("pal_ds", run_name="__main__", alter_sys=True)

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        ranks = fork_ranks(max(num_ranks, 1), work, log)
        codes = wait_for(ranks, seconds=60, grace=30)
        said = [Path(f"{log}.{rank.number}").read_text() for rank in ranks]
    return list(zip(codes, said, strict=True))
