"""The process group: who am I, what do all ranks share, and a clean way out.

Locks that killed builds of torch extensions left are removed first: every later start would wait for them, silently and
for ever. torch builds and loads DeepSpeed's operators under a file named `lock`, which the process at work holds open
until it removes it; all others wait for as long as the file exists.
"""

import contextlib
import datetime
import io
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as torch_dist

from pal_ds.distributed import phase
from pal_ds.distributed.rendezvous import met
from pal_ds.distributed.room import refuse_too_little_room
from pal_ds.distributed.watchdog import meeting
from pal_ds.distributed.world import World
from pal_ds.errors import LauncherError, StorageError, UserError

logger = logging.getLogger(__name__)

BY_OTHERS = 6.0
"""Patience (`phase.enter`) for imports, tokenizers and communication libraries: they report no progress."""


def _fill_rank_variables() -> list[str]:
    """A plain `python -m pal_ds` is a world of one; launchers set these variables themselves. Names those it set.

    Kubeflow's PyTorchJob and others start one process in each container and leave LOCAL_RANK out: it is 0 there.

    Raises:
        LauncherError: a launcher, or a shell that exported RANK, left out where the ranks meet.
    """
    if "RANK" in os.environ:
        needed = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in needed if name not in os.environ]:
            raise LauncherError(
                f"RANK is {os.environ['RANK']} in the environment, and {', '.join(missing)} are not set: ranks cannot "
                "meet. Let a launcher (torchrun, deepspeed, srun) set all of them, or unset RANK for a single process."
            )
        if "LOCAL_RANK" in os.environ:
            return []
        logger.info("LOCAL_RANK is not set: taken as 0, one process in each container")
        os.environ["LOCAL_RANK"] = "0"
        return []
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise LauncherError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} in the environment, and RANK is not set: nothing says which "
            "rank this process is. Let a launcher (torchrun, deepspeed, srun) set RANK, WORLD_SIZE, MASTER_ADDR and "
            "MASTER_PORT, or unset WORLD_SIZE for a single process."
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)
    return list(alone)


@contextlib.contextmanager
def distributed(
    timeout_minutes: int = 30,
    hang_minutes: float = 0.0,
    first: Callable[[], None] = lambda: None,
) -> Iterator[World]:
    """Starts DeepSpeed's process group and takes it down at the end; finish the process with `leave`.

    From before the ranks meet to their end a watchdog looks after them, where there are several and `hang_minutes` is
    not 0. `first` is work before the group is made, of rank 0 alone perhaps: no collective waits for it.

    Raises:
        LauncherError: the environment, or the port in it, does not let ranks meet.
        StorageError: this process cannot start the threads that it needs.
        RankLostError: another rank did not come, or hangs or ended before the end.
    """
    # Before an hour of preparing, and in `_join` again: what is loaded in between takes room, too.
    refuse_too_little_room()
    filled, excepthook = _fill_rank_variables(), sys.excepthook
    timeout = datetime.timedelta(minutes=timeout_minutes)
    # A world of one needs no port.
    place = contextlib.nullcontext(torch_dist.HashStore()) if filled else met(timeout, hang_minutes)
    try:
        with place as store:
            phase.enter("prepare", patience=BY_OTHERS)
            first()
            phase.enter("join the process group", patience=BY_OTHERS)
            world = _join(store, timeout)
            try:
                yield world
                world.barrier()
            finally:
                if torch_dist.is_initialized():
                    from deepspeed import comm

                    # DeepSpeed's, as it keeps groups of its own, which a second training here must not meet.
                    comm.destroy_process_group()
    finally:
        for name in filled:
            os.environ.pop(name, None)
        if filled:
            # torch's names the rank before each line of a traceback; a notebook that goes on has none.
            sys.excepthook = excepthook


def _join(store: torch_dist.Store, timeout: datetime.timedelta) -> World:
    """Make the process group of the ranks that meet at `store`."""
    # deepspeed calls collectives under names that newer torch deprecates: nothing a user could mend.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # torch builds DeepSpeed's CPU operators with ninja, which pip put beside this interpreter.
    beside = str(Path(sys.executable).parent)
    os.environ["PATH"] = os.pathsep.join([beside, os.environ.get("PATH", "")])
    # Imported here: deepspeed takes seconds, and `--help` should not pay for it.
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
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
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    refuse_too_little_room()
    with meeting():
        torch_dist.init_process_group(
            backend, timeout=timeout, store=store, rank=rank, world_size=world_size
        )
        with operators_have_a_place(), prints_as_log_lines():
            deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
        control = torch_dist.new_group(backend="gloo", timeout=timeout)
    return World(rank, world_size, device, control)


@contextlib.contextmanager
def prints_as_log_lines() -> Iterator[None]:
    """Log what the block prints, once it is over: standard output is for results, and `--quiet` for neither."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        for line in said.getvalue().splitlines():
            logger.info("%s", line)


@contextlib.contextmanager
def joined_or_alone(timeout_minutes: int = 30, hang_minutes: float = 0.0) -> Iterator[World]:
    """The launcher's process group where there is one, else a world of one that needs no DeepSpeed."""
    if "RANK" in os.environ:
        with distributed(timeout_minutes, hang_minutes) as world:
            yield world
        return
    yield World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


@contextlib.contextmanager
def operators_have_a_place() -> Iterator[None]:
    """Raise StorageError where the block fails to make the folder into which torch builds DeepSpeed's operators."""
    try:
        yield
    except OSError as error:
        root = _folder_of_operators()
        failed = Path(str(error.filename))
        if error.filename is None or not (failed.is_relative_to(root) or failed in root.parents):
            raise
        raise StorageError(
            f"{root}: cannot be made or written ({error.strerror}), and torch builds DeepSpeed's operators there. Name "
            "a folder that this user may write: TORCH_EXTENSIONS_DIR."
        ) from error


def _folder_of_operators() -> Path:
    """Return torch's folder of built operators, as torch.utils.cpp_extension (a slow import) has it."""
    from torch._appdirs import user_cache_dir

    root = os.environ.get("TORCH_EXTENSIONS_DIR", user_cache_dir(appname="torch_extensions"))
    return Path(root)


STALE_AFTER_SECONDS = 180.0
"""Seconds without a change in a lock's folder: a build on another node is not seen here, but it writes files there."""


def remove_stale_build_locks(stale_after: float = STALE_AFTER_SECONDS) -> None:
    """Remove, with a warning, locks that no process here holds after `stale_after` seconds without a change."""
    for lock in _folder_of_operators().glob("**/lock"):
        _wait_or_remove(lock, stale_after)


def _wait_or_remove(lock: Path, stale_after: float) -> None:
    seen_at, has_warned = time.monotonic(), False
    while str(lock.resolve()) not in _open_files():
        changes = []
        for path in lock.parent.iterdir():
            with contextlib.suppress(FileNotFoundError):  # a compiler's temporary file
                changes.append(path.stat().st_mtime)
        if not lock.exists():
            return
        if time.time() - max(changes) > stale_after:
            lock.unlink(missing_ok=True)
            logger.warning(
                "%s: removed; whoever built %s was killed, and every start would have waited for it",
                lock,
                lock.parent.name,
            )
            return
        if not has_warned and time.monotonic() - seen_at > 2:
            has_warned = True
            logger.warning(
                "%s: waiting for a build of %s that no process here makes; removed after %.0f s without a change",
                lock,
                lock.parent.name,
                stale_after,
            )
        time.sleep(0.2)


def _open_files() -> Iterator[str]:
    """Yield the files that processes of this user on this machine hold open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # closed meanwhile, or another user's
            yield str(descriptor.readlink())
