"""Content hashes of files, read in pieces so that a large file needs little memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

CHUNK_BYTES = 1 << 20


class Digest(Protocol):
    """A hash in the making, as hashlib and xxhash give them."""

    def update(self, data: bytes | memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


D = TypeVar("D", bound=Digest)


def feed(digest: D, path: Path, progress: Callable[[], None] = lambda: None) -> D:
    """Update a digest with all bytes of a file, and return it.

    Args:
        digest: of hashlib or xxhash.
        path: the file.
        progress: called after each piece, so that a watchdog sees a long read go on.
    """
    # One buffer for all: fresh memory for each piece would cost more than its bytes.
    chunk = memoryview(bytearray(CHUNK_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while num_read := stream.readinto(chunk):
            digest.update(chunk[:num_read])
            progress()
    return digest
