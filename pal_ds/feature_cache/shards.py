"""A file of hidden states: packed, named by the hash of its own content, verified, memory-mapped.

A shard is a safetensors file that holds its part of the index, too, so that one rename makes both visible.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from pal_ds.errors import StorageError
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.io.files import feed

SUFFIX = ".safetensors"
ADDRESS_BYTES = 16
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


class DamagedShardError(Exception):
    """A shard is not what was written; its states have to be computed again."""


def address_of(before: np.ndarray, scored: np.ndarray) -> bytes:
    """By what a text is found: a hash of its token ids and of where in them the response begins.

    Cryptographic, as texts come from strangers and a collision would be another text's states.
    """
    digest = hashlib.blake2b(len(before).to_bytes(8, "little"), digest_size=ADDRESS_BYTES)
    digest.update(np.concatenate([before, scored]).astype("<i8").tobytes())
    return digest.digest()


def as_addresses(joined: bytes) -> np.ndarray:
    """uint64 [n, 2] of n addresses one after the other."""
    return np.frombuffer(joined, "<u8").reshape(-1, 2)


def pack_shard(key: str, addresses: list[bytes], states: list[Tensor]) -> bytes:
    """The content of a shard with the states [n_i, H] of the texts at `addresses`; `key` says of which backbone."""
    tensors = {
        "addresses": torch.frombuffer(bytearray(b"".join(addresses)), dtype=torch.uint8),
        "lengths": torch.tensor([len(state) for state in states], dtype=torch.int64),
        "values": torch.cat(states).contiguous(),
    }
    return save(tensors, metadata={"key": key})


def shard_name(content: bytes) -> str:
    """The file name that this content has."""
    return xxhash.xxh3_128_hexdigest(content) + SUFFIX


def verify_shard(path: Path, progress: Callable[[], None]) -> None:
    """Reads all of the file, calling `progress` now and then.

    Raises:
        DamagedShardError: its content has another hash than its name says.
    """
    content = feed(xxhash.xxh3_128(), path, progress).hexdigest()
    if content != path.name.removesuffix(SUFFIX):
        raise DamagedShardError(f"{path}: its content does not match the hash in its name")


_verified: set[tuple[str, int, int]] = set()
"""(path, bytes, time of the last change in ns) of files that this process has read and found whole."""


def verify_once(path: Path, progress: Callable[[], None]) -> None:
    """Verify as `verify_shard` does; a file that was verified in this process and is unchanged is not read again."""
    state = path.stat()
    seen = (str(path), state.st_size, state.st_mtime_ns)
    if seen not in _verified:
        verify_shard(path, progress)
        _verified.add(seen)


@dataclass(frozen=True)
class Shard:
    """An open shard: what it holds of the index, and its states, which stay on the disk until they are read."""

    key: str
    addresses: np.ndarray
    """uint64 [t, 2]"""
    lengths: np.ndarray
    """Rows of `values` that each of the t texts has, one text after the other, int64."""
    values: Float[Tensor, "n H"]
    """Memory-mapped, fp32 or bf16."""

    @classmethod
    def map(cls, path: Path) -> "Shard":
        """Maps a file that `verify_shard` has found whole; only its part of the index is read.

        Raises:
            StorageError: it cannot be mapped.
        """
        size = path.stat().st_size
        try:
            content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
        except RuntimeError as error:
            raise StorageError(
                f"{path}: cannot be mapped into memory ({str(error).splitlines()[0]}). Raise the limits on address "
                "space and on mappings (ulimit -v, vm.max_map_count), or unset backbone.cache."
            ) from None
        begin = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
        header = json.loads(content[8:begin].numpy().tobytes())

        def part(name: str) -> Tensor:
            first, last = header[name]["data_offsets"]
            return content[begin + first : begin + last]

        entry = header["values"]
        return cls(
            header["__metadata__"]["key"],
            as_addresses(part("addresses").numpy().tobytes()),
            np.frombuffer(part("lengths").numpy().tobytes(), "<i8"),
            part("values").view(_DTYPES[entry["dtype"]]).view(entry["shape"]),
        )
