"""Files and folders that are whole or absent (written beside, flushed to the disk, renamed), and hashes of files."""

import contextlib
import glob
import json
import logging
import os
import shutil
import site
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pal_ds.errors import UserError, writing
from pal_ds.io.fault_points import reached

logger = logging.getLogger(__name__)
CHUNK_BYTES = 1 << 20
"""Bytes that are hashed at a time, of a size that a processor still holds when it hashes what it has just read."""


def shipped_folder(name: str, pattern: str) -> Path:
    """Return the folder `name` that comes with pal_ds and has files like `pattern`: a checkout's, or where pip put it.

    pip's folder is share/pal_ds of the environment, of the user's own base, or of what `--target` named.
    """
    beside = Path(__file__).resolve().parents[2]
    bases = (beside / "share", Path(sys.prefix, "share"), Path(site.getuserbase(), "share"))
    places = [beside / name, *(base / "pal_ds" / name for base in bases)]
    return next((place for place in places if any(place.glob(pattern))), places[2])


def at_home(path: str | os.PathLike[str]) -> Path:
    """Return a path as a person means it: `~` is the home folder, which no shell puts into a recipe or into Python.

    >>> at_home("runs/~mine"), at_home("~nobody-of-this-name/x")
    (PosixPath('runs/~mine'), PosixPath('~nobody-of-this-name/x'))
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)  # nobody of this name has a home


def expand_home(config: object, *names: str) -> None:
    """Put the home folder for `~` into these fields of a frozen dataclass; a text without it, or None, stays."""
    for name in names:
        if str(path := getattr(config, name)).startswith("~"):
            object.__setattr__(config, name, str(at_home(path)))


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's text: it holds the old text or the new one, never a part (written beside it, fsync, rename).

    Raises:
        StorageError: there is no room or no permission; the old text is still there.
    """
    with writing(path), replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write to: at the end of the block what was written is on the disk and named `path`."""
    # A name of its own: the watchdog's thread may tell of a failure while the main thread writes the same file.
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        yield temporary
        sync_to_disk(temporary)
        reached("file written")
        os.replace(temporary, path)
    except BaseException:
        # What did fit would take room for nothing.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    sync_to_disk(path.parent)


def sync_to_disk(path: Path) -> None:
    """Make a file's content, or what changed in a directory (names made, moved, deleted), outlive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON. Raises StorageError as `write_atomically` does."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def everything_under(folder: Path) -> Iterator[Path]:
    """Yield `folder` and all below it, without following links; what another process deletes meanwhile is left out."""
    yield folder

    def refuse_all_but_vanished(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for inside, folders, files in os.walk(folder, onerror=refuse_all_but_vanished):
        for name in sorted((*folders, *files)):
            yield Path(inside, name)


def is_free(out: Path) -> bool:
    """Return True where `out` holds nothing."""
    return not out.exists() or (out.is_dir() and not any(out.iterdir()))


def clear_aside(out: Path) -> None:
    """Delete what killed writers of the folder `out` left beside it, on any machine; nobody else may be at work.

    A folder that one of them had moved away (OUT.tmp-old-PID) for another in its place is put back.
    """
    beside = f"{glob.escape(out.name)}.tmp-"
    if not out.exists() and (old := sorted(out.parent.glob(f"{beside}old-*"))):
        old[-1].rename(out)
    for left in filter(Path.is_dir, out.parent.glob(f"{beside}*-*")):
        logger.info("%s: left by a process that was killed; deleted", left)
        shutil.rmtree(left)


def refuse_existing(out: Path) -> None:
    """Raise UserError where `out` holds something, or is the current directory, from which paths are read."""
    if not is_free(out):
        raise UserError(f"{out}: exists and is not empty. Name another folder, or remove it first.")
    if out.exists() and out.samefile(Path.cwd()):
        raise UserError(
            f"{out}: is the current directory, and what is made there would take its place. Name a folder in it."
        )


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder that becomes `out` at the end of the block, and is deleted where anything fails in it.

    All of it is on the disk before it has its name; an empty folder of that name gives way.

    Raises:
        StorageError: it cannot be written.
        UserError: somebody else wrote `out` meanwhile.
    """
    with writing(out):
        temporary = folder_aside(out)
        try:
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                if not path.is_symlink():  # what a link leads to is among these files
                    sync_to_disk(path)
            reached("folder written")
            try:
                os.replace(temporary, out)
            except OSError:
                refuse_existing(out)
                raise
            sync_to_disk(out.parent)
            reached("folder renamed")
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def new_files(out: Path) -> Iterator[Path]:
    """Yield a folder whose files join those of `out` at the end of the block, in the order in which they were written.

    Where anything fails in the block, `out` stays as it was.

    Raises:
        StorageError: they cannot be written.
        UserError: `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file. Name a folder, new or of these files.")
    with writing(out):
        temporary = folder_aside(out)
        try:
            yield temporary
            written = sorted(temporary.iterdir(), key=lambda path: path.stat().st_mtime_ns)
            for path in written:
                sync_to_disk(path)
            reached("files written")
            out.mkdir(exist_ok=True)
            for path in written:
                os.replace(path, out / path.name)
                reached(f"{path.name} written")
            sync_to_disk(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def folder_aside(out: Path) -> Path:
    """Make a folder beside `out`, in place of those that killed writers on this machine left."""
    out = out if out.name else out.resolve()  # `.` has no name
    prefix = f"{out.name}.tmp-{socket.gethostname()}-"
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        pid = left.name.removeprefix(prefix)
        # In a container a killed process and its successor often have the same number.
        if pid.isdecimal() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            logger.info("%s: left by a process that was killed; deleted", left)
            shutil.rmtree(left)
    temporary = out.with_name(f"{prefix}{os.getpid()}")
    temporary.mkdir()
    return temporary


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # somebody else's
    return True


def feed(digest: Any, path: Path, progress: Callable[[], None] = lambda: None) -> Any:
    """Update a digest of hashlib or xxhash with all bytes of a file, and return it.

    `progress` is called after each piece, so that a watchdog sees a long read go on.
    """
    # One buffer for all: fresh memory for each piece would cost more than its bytes.
    chunk = memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while num_read := stream.readinto(chunk):
            digest.update(chunk[:num_read])
            progress()
    return digest
