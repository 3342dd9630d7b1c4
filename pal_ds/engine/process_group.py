"""The process group: who am I, what do all ranks share, and a clean way out.

Every decision that ranks must share is taken on rank 0 and broadcast (`World.from_rank_zero`), then acted on by all.
"""

import contextlib
import datetime
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as torch_dist

from pal_ds.distributed.watchdog import meeting
from pal_ds.distributed.world import World
from pal_ds.engine.build_lock import remove_stale_build_locks
from pal_ds.errors import UserError


def _fill_rank_variables() -> list[str]:
    """A plain `python -m pal_ds` is a world of one; launchers set these variables themselves. Names those it set."""
    if "RANK" in os.environ:
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)
    return list(alone)


_stores: list[torch_dist.Store] = []
"""Where the ranks of a launcher met first, and again for each later group of this process under a prefix of its own."""


def _meet_again(backend: str, timeout: datetime.timedelta) -> None:
    """Joins the ranks once more after an earlier group came to its end: its keys are still in the launcher's store."""
    store = torch_dist.PrefixStore(f"pal_ds_{len(_stores)}", _stores[0])
    _stores.append(store)
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    torch_dist.init_process_group(
        backend, timeout=timeout, store=store, rank=rank, world_size=world_size
    )


@contextlib.contextmanager
def distributed(timeout_minutes: int = 30) -> Iterator[World]:
    """Starts DeepSpeed's process group and takes it down at the end; finish the process with `leave`."""
    filled, excepthook = _fill_rank_variables(), sys.excepthook
    # deepspeed calls collectives under names that newer torch deprecates: nothing a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch builds DeepSpeed's CPU operators with ninja, which pip put beside this interpreter.
    os.environ["PATH"] = os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )
    # Imported here: deepspeed takes seconds, and `--help` should not pay for it.
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        num_local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        num_gpus = torch.cuda.device_count()
        if 1 < num_gpus < num_local:
            raise UserError(
                f"{num_local} ranks on this node and {num_gpus} GPUs: launch one rank per GPU."
            )
        # Under per-task GPU binding each process sees one device, whatever its local rank.
        device = torch.device("cuda", 0 if torch.cuda.device_count() == 1 else local_rank)
        torch.cuda.set_device(device)
        # What NCCL's collectives were at, should one time out before the watchdog ends the run.
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    if local_rank == 0:
        remove_stale_build_locks()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=timeout_minutes)
    with meeting():
        if _stores and not filled:
            _meet_again(backend, timeout)
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        if not _stores and not filled:
            _stores.append(torch_dist.distributed_c10d._get_default_store())
        control = torch_dist.new_group(backend="gloo", timeout=timeout)
    world = World(torch_dist.get_rank(), torch_dist.get_world_size(), device, control)
    try:
        yield world
        world.barrier()
    finally:
        if torch_dist.is_initialized():
            # DeepSpeed's, as it keeps groups of its own, which a second training in this process must not meet.
            deepspeed.comm.destroy_process_group()
        for name in filled:
            os.environ.pop(name, None)
        if filled:
            # torch's names the rank before each line of a traceback; a notebook that goes on has none.
            sys.excepthook = excepthook


@contextlib.contextmanager
def joined_or_alone(timeout_minutes: int = 30) -> Iterator[World]:
    """The launcher's process group where there is one, else a world of one that needs no DeepSpeed."""
    if "RANK" in os.environ:
        with distributed(timeout_minutes) as world:
            yield world
        return
    yield World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
