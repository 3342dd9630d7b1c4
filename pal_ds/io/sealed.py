"""Lists of files with size and hash, dealt out among readers, and JSON files that carry their own checksum."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict

import xxhash

from pal_ds.io.files import feed

_NO_CHECKSUM = "0" * 32


class FileEntry(TypedDict):
    """Entry of a file in a list."""

    size: int
    """Size in bytes."""
    xxh3_128: str
    """xxh3 hash of the content, 128 bits in hexadecimal."""


def hash_of(path: Path, progress: Callable[[], None] = lambda: None) -> str:
    """Return the xxh3 hash of a file, 128 bits in hexadecimal: fast enough for many gigabytes.

    `progress` is called after each piece, so that a watchdog sees a long read go on.
    """
    return feed(xxhash.xxh3_128(), path, progress).hexdigest()


def list_files(folder: Path, *, without: str) -> dict[str, FileEntry]:
    """Return the entries of all files below `folder`, by their path there, but for the one named `without`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: {"size": path.stat().st_size, "xxh3_128": hash_of(path)}
        for name, path in named.items()
        if name != without
    }


def share_of(
    files: Mapping[str, FileEntry], rank: int, world_size: int
) -> dict[int, tuple[str, FileEntry]]:
    """Return the files that a rank reads, the largest dealt out first, under their places in the list.

    >>> files = {name: {"size": size, "xxh3_128": ""} for name, size in (("a", 1), ("b", 9), ("c", 5))}
    >>> [[name for name, _ in share_of(files, rank, world_size=2).values()] for rank in (0, 1)]
    [['a', 'b'], ['c']]
    """
    listed = list(enumerate(files.items()))
    dealt = sorted(listed, key=lambda item: -item[1][1]["size"])[rank::world_size]
    return dict(sorted(dealt))


def seal(content: Mapping[str, object], *, indent: int) -> str:
    """Return the content as JSON with `checksum` first: xxh3, 128 bits, of the text with zeros in its place.

    >>> text = seal({"step": 3}, indent=1)
    >>> is_intact(text.encode()), is_intact(text.replace("3", "4", 1).encode())
    (True, False)
    """
    text = json.dumps({"checksum": _NO_CHECKSUM, **content}, indent=indent) + "\n"
    digest = xxhash.xxh3_128(text.encode()).hexdigest()
    return text.replace(_NO_CHECKSUM, digest, 1)


def is_intact(content: bytes) -> bool:
    """Return True where a JSON object has the checksum that `seal` gave it. Raises ValueError for what is no JSON."""
    parsed = json.loads(content)
    checksum = parsed.get("checksum") if isinstance(parsed, dict) else None
    if not isinstance(checksum, str) or len(checksum) != len(_NO_CHECKSUM):
        return False
    blank = content.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1)
    return checksum == xxhash.xxh3_128(blank).hexdigest()
