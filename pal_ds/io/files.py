"""Write files that are whole or absent: beside, flushed to the disk, renamed."""

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

from pal_ds.errors import writing


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
