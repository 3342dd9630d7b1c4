"""Publication of an exported folder: it gets its name all at once, after all of it is on the disk."""

import contextlib
import glob
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from pal_ds.errors import UserError, writing
from pal_ds.io.fault_points import reached
from pal_ds.io.files import sync_to_disk

logger = logging.getLogger(__name__)


def refuse_existing(out: Path) -> None:
    """Raise UserError where `out` holds something."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not empty. Name another folder, or remove it first.")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out` at the end of the block, and goes where anything fails in it.

    Raises:
        StorageError: it cannot be written.
    """
    with writing(out):
        temporary = folder_aside(out)
        try:
            yield temporary
            publish(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def folder_aside(out: Path) -> Path:
    """Make a new folder beside `out`, in place of those that exports on this machine left when they were killed."""
    prefix = f"{out.name}.tmp-{socket.gethostname()}-"
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        pid = left.name.removeprefix(prefix)
        if pid.isdecimal() and not _is_running(int(pid)):
            logger.info("%s: left by an export that was killed; deleted", left)
            shutil.rmtree(left)
    temporary = out.with_name(f"{prefix}{os.getpid()}")
    temporary.mkdir()
    return temporary


def publish(temporary: Path, out: Path) -> None:
    """Give a folder its name once all of it is on the disk; an empty folder of that name gives way."""
    for path in temporary.rglob("*"):
        if path.is_dir():
            sync_to_disk(path)
        elif not path.is_symlink():  # what a link leads to is among these files
            with open(path, "rb") as stream:
                os.fsync(stream.fileno())
    sync_to_disk(temporary)
    reached("export written")
    os.replace(temporary, out)
    sync_to_disk(out.parent)
    reached("export renamed")


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True
