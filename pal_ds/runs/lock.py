"""Locks: two trainings into one run directory would delete each other's checkpoints, two `prepare` work twice."""

import contextlib
import errno
import fcntl
import json
import logging
import math
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from pal_ds.distributed import phase, preemption
from pal_ds.errors import BusyError, UserError, writing
from pal_ds.runs.run_dir import RunDirectory

logger = logging.getLogger(__name__)

LOCK = "lock"
WAIT_SECONDS = 120.0
"""A network file system holds a dead node's lock for about a minute and a half."""


@contextlib.contextmanager
def only_writer(run: RunDirectory, wait_seconds: float = WAIT_SECONDS) -> Iterator[None]:
    """Hold `D/lock` inside the block. The kernel lets go of it however the process ends.

    Raises:
        BusyError: another process holds it, and still does after `wait_seconds`.
        StorageError: the run directory cannot be written to.
    """
    if run.path.is_symlink() and not run.path.exists():
        raise UserError(
            f"--run_dir {run.path}: is a link to {run.path.readlink()}, which is not there. Make that folder, or "
            "delete the link."
        )
    for path, is_run in ((run.path, True), (run.checkpoints, False)):
        if path.exists() and not path.is_dir():
            named = "--run_dir " if is_run else ""
            raise UserError(f"{named}{path}: is a file. Name a directory, new or of this run.")
    if (run.path / LOCK).is_dir():
        raise UserError(f"{run.path / LOCK}: is a folder, where a file is made. Take it away.")
    remedy = "One training or removal at a time: start again later, or name another --run_dir."
    with held(run.path / LOCK, run.path, remedy, wait_seconds):
        yield


@contextlib.contextmanager
def held(lock: Path, what: Path, remedy: str, wait_seconds: float = math.inf) -> Iterator[bool]:
    """Hold the file `lock` inside the block, as `what` is to have one writer; yields False where there are no locks.

    Raises:
        BusyError: another process holds it, and still does after `wait_seconds` or when a stop is asked for.
        StorageError: the file cannot be written.
    """
    made = [path for path in lock.parents if not path.exists()]
    try:
        with writing(what):
            descriptor = _acquired(lock, what, remedy, wait_seconds)
        try:
            yield not stat.S_ISCHR(os.fstat(descriptor).st_mode)
        finally:
            # Unlinked while it is held: who waits for it finds out and opens the next one.
            lock.unlink(missing_ok=True)
            os.close(descriptor)
    finally:
        for path in made:
            # A start that was refused leaves nothing.
            with contextlib.suppress(OSError):  # something is in it, or it was never made
                path.rmdir()


def _acquired(path: Path, what: Path, remedy: str, wait_seconds: float) -> int:
    """An open descriptor of the lock file, locked. POSIX locks are used: forked workers do not inherit them."""
    deadline, has_warned = time.monotonic() + wait_seconds, False
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # its last holder had made the directory, and took it away again
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                logger.warning(
                    "%s: this file system has no locks (%s); nothing keeps a second writer out",
                    path,
                    os.strerror(error.errno or 0),
                )
                return os.open(os.devnull, os.O_RDONLY)
            # Whoever asks for a stop now does not want to wait for another run.
            if time.monotonic() > deadline or preemption.stop_is_requested():
                raise BusyError(f"{what}: in use by {holder}. {remedy}") from None
            if not has_warned:
                limit = "until it ends" if math.isinf(wait_seconds) else f"{wait_seconds:.0f} s"
                logger.warning("%s: in use by %s; waiting %s", what, holder, limit)
                has_warned = True
            phase.progress()  # this wait has its own end
            time.sleep(0.2)
            continue
        if _is_at(path, descriptor):
            try:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, json.dumps(_own_name()).encode())
            except OSError:
                path.unlink()
                os.close(descriptor)
                raise
            return descriptor
        os.close(descriptor)


def _own_name() -> dict[str, object]:
    """A name by which a person finds this process: in a SLURM job its number, as its host may be anywhere."""
    given = {"slurm_job": "SLURM_JOB_ID", "slurm_restarts": "SLURM_RESTART_COUNT"}
    of_job = {name: os.environ[key] for name, key in given.items() if key in os.environ}
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        **of_job,
        "since": time.ctime(),
    }


def _is_at(path: Path, descriptor: int) -> bool:
    """Return True where the open file is still the one of that name: its last holder may have unlinked it."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
