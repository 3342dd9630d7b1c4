"""Locks that killed builds of torch extensions left: every later start would wait for them, silently and for ever.

torch builds DeepSpeed's operators under a file named `lock`, which the building process holds open until it removes
it; all others wait for as long as the file exists.
"""

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

STALE_AFTER_SECONDS = 600
"""Without a change in the folder. Another node's build, on a shared home, cannot be seen, but writes files there."""


def remove_stale_build_locks() -> None:
    """Removes locks that no process here holds and whose builds have written nothing for a while, with a warning."""
    for lock in extensions_root().glob("**/lock"):
        try:
            quiet = time.time() - max(path.stat().st_mtime for path in lock.parent.iterdir())
        except (OSError, ValueError):
            continue  # it has been released meanwhile
        if _is_held(lock):
            continue
        if quiet < STALE_AFTER_SECONDS:
            logger.warning(
                "%s: a build of %s elsewhere, or one that was killed. If this start hangs, delete the file.",
                *(lock, lock.parent.name),
            )
            continue
        logger.warning("%s: removed; a build of %s was killed here", lock, lock.parent.name)
        lock.unlink(missing_ok=True)


def extensions_root() -> Path:
    """Where torch builds extensions; as in torch.utils.cpp_extension, whose import is slow."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    if named is not None:
        return Path(named)
    from torch._appdirs import user_cache_dir

    # One folder per Python and accelerator; all are looked at.
    return Path(user_cache_dir(appname="torch_extensions"))


def _is_held(lock: Path) -> bool:
    """Whether a process of this user on this machine has the file open."""
    target = str(lock.resolve())
    return any(link == target for link in _open_files())


def _open_files() -> Iterator[str]:
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield str(descriptor.readlink())
        except OSError:
            continue  # closed meanwhile, or another user's
