"""Locks that killed builds of torch extensions left: every later start would wait for them, silently and for ever.

torch builds and loads DeepSpeed's operators under a file named `lock`, which the process at work holds open until it
removes it; all others wait for as long as the file exists.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

STALE_AFTER_SECONDS = 180.0
"""Seconds without a change in a lock's folder: a build on another node is not seen here, but it writes files there."""


def remove_stale_build_locks(stale_after: float = STALE_AFTER_SECONDS) -> None:
    """Remove, with a warning, locks that no process here holds after `stale_after` seconds without a change."""
    for lock in extensions_root().glob("**/lock"):
        _wait_or_remove(lock, stale_after)


def _wait_or_remove(lock: Path, stale_after: float) -> None:
    seen_at, has_warned = time.monotonic(), False
    while not _is_held(lock):
        quiet = _seconds_without_change(lock)
        if quiet is None:
            return
        if quiet > stale_after:
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


def _seconds_without_change(lock: Path) -> float | None:
    """Seconds since anything changed in the lock's folder; None where the lock has been released meanwhile."""
    times = []
    for path in lock.parent.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a compiler's temporary file
            times.append(path.stat().st_mtime)
    return time.time() - max(times) if lock.exists() else None


def extensions_root() -> Path:
    """Return the folder in which torch builds extensions, as torch.utils.cpp_extension (a slow import) has it."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named is not None:
        return Path(named)
    from torch._appdirs import user_cache_dir

    # One folder per Python and accelerator; all are looked at.
    return Path(user_cache_dir(appname="torch_extensions"))


def _is_held(lock: Path) -> bool:
    """Return True where a process of this user on this machine has the lock open."""
    return str(lock.resolve()) in _open_files()


def _open_files() -> Iterator[str]:
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield str(descriptor.readlink())
        except OSError:
            continue  # closed meanwhile, or another user's
