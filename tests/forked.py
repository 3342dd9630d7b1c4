"""Runs worlds of several sizes, one after the other, from one process that has imported everything.

Torchrun makes each rank import for itself, which costs more than what it then does: a test of a dozen ranks forks them.
"""

import functools
import gc
import importlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable

import cpuinfo

from pal_ds.distributed.world import World, leave
from pal_ds.engine.process_group import distributed

LATE_IMPORTS = (
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "pal_ds.backbones.transformer",
    "peft",
    "setuptools",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
)


def prepare_to_fork() -> None:
    """What each rank would else do again: late imports, and looking through all of them for garbage at every start."""
    for name in LATE_IMPORTS:
        importlib.import_module(name)
    # DeepSpeed's CPU Adam asks for the processor's maker, in a process of its own, each time.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    cpuinfo.get_cpu_info()
    gc.collect()
    gc.freeze()


def run_world(world_size: int, work: Callable[[World], None]) -> None:
    """Forks the ranks and waits for them; where one fails, the others end, and so does this process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = time.monotonic()
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=_run_rank, args=(rank, world_size, port, work))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks):
        time.sleep(0.02)
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.terminate()
    print(f"{world_size} ranks: {time.monotonic() - started:.1f} s", flush=True)
    if any(rank.exitcode for rank in ranks):
        sys.exit(1)


def _run_rank(rank: int, world_size: int, port: int, work: Callable[[World], None]) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    here |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in here.items()})
    try:
        with distributed() as world:
            work(world)
    except BaseException:
        print(f"[rank {rank} of {world_size}]\n{traceback.format_exc()}", file=sys.stderr)
        leave(1)
    leave(0)
