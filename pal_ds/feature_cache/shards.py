"""Files of hidden states: packed, named by the hash of their content, verified, memory-mapped; an index over them.

A shard is a safetensors file that holds its part of the index, too, so that one rename makes both visible.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pal_ds.data.features import MappedFeatures
from pal_ds.errors import StorageError
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.io.files import feed

SUFFIX = ".safetensors"
ADDRESS_BYTES = 16
_TENSORS = ("addresses", "lengths", "values")


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
        DamagedShardError: its content has another hash than its name says, or is none of states.
    """
    content = feed(xxhash.xxh3_128(), path, progress).hexdigest()
    if content != path.name.removesuffix(SUFFIX):
        raise DamagedShardError(f"{path}: its content does not match the hash in its name")
    try:
        with safe_open(str(path), "pt") as file:
            sound = "key" in (file.metadata() or {}) and set(file.keys()) == set(_TENSORS)
    except SafetensorError as error:
        raise DamagedShardError(f"{path}: is no safetensors file ({error})") from None
    if not sound:
        raise DamagedShardError(f"{path}: holds no states")


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
        try:
            with safe_open(str(path), "pt") as file:
                return cls(
                    key=file.metadata()["key"],
                    addresses=as_addresses(file.get_tensor("addresses").numpy().tobytes()),
                    lengths=file.get_tensor("lengths").numpy().copy(),
                    values=file.get_tensor("values"),
                )
        except (MemoryError, RuntimeError) as error:
            raise StorageError(
                f"{path}: cannot be mapped into memory ({str(error).splitlines()[0]}). Raise the limits on address "
                "space and on mappings (ulimit -v, vm.max_map_count), or unset backbone.cache."
            ) from None


def first_of_each(addresses: np.ndarray) -> np.ndarray:
    """Find where each distinct address (uint64 [n, 2]) first occurs, in ascending order of address; int64."""
    return np.unique(_as_texts(addresses), return_index=True)[1]


def _as_texts(addresses: np.ndarray) -> np.ndarray:
    """The 16 bytes of each address as one value, which numpy sorts and compares as it does texts."""
    return np.ascontiguousarray(addresses).view(f"S{ADDRESS_BYTES}")[:, 0]


class FeatureIndex:
    """An index of which text lies in which shard. A text that two writers have stored counts once."""

    def __init__(self, shards: list[Shard]) -> None:
        self.values = [shard.values for shard in shards]
        nothing = np.empty((0, 2), np.uint64)
        addresses = np.concatenate([nothing, *(shard.addresses for shard in shards)])
        of_shard = np.repeat(np.arange(len(shards)), [len(shard.lengths) for shard in shards])
        begin = [np.cumsum(shard.lengths) - shard.lengths for shard in shards]
        self._addresses, order = np.unique(_as_texts(addresses), return_index=True)
        self._shard = of_shard[order].astype(np.int64)
        self._begin = np.concatenate([np.empty(0, np.int64), *begin])[order]
        lengths = [np.empty(0, np.int64), *(shard.lengths for shard in shards)]
        self._lengths = np.concatenate(lengths)[order]

    def __len__(self) -> int:
        return len(self._addresses)

    def find(self, addresses: np.ndarray) -> np.ndarray:
        """Entry of each address (uint64 [n, 2]), -1 for those that are not here; int64 [n]."""
        if len(self) == 0:
            return np.full(len(addresses), -1, np.int64)
        wanted = _as_texts(addresses)
        entries = np.minimum(np.searchsorted(self._addresses, wanted), len(self) - 1)
        return np.where(self._addresses[entries] == wanted, entries, -1)

    def store(self, entries: np.ndarray, rows: np.ndarray, num_rows: int) -> MappedFeatures:
        """A store for a table of `num_rows` texts, of which `rows` lie at `entries`."""
        shard = np.full(num_rows, -1, np.int64)
        begin, lengths = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
        shard[rows], begin[rows] = self._shard[entries], self._begin[entries]
        lengths[rows] = self._lengths[entries]
        return MappedFeatures(self.values, shard, begin, lengths)
