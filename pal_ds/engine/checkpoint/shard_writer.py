"""Writes and reads DeepSpeed's shards: hashed as they are written, no rank left waiting, nothing run on reading.

DeepSpeed saves through an exchangeable object. Its own raises on the one rank whose disk is full, and the others wait
in a barrier; and it reads pickles that may run any code.
"""

import io
import os
import pickle
import re
from pathlib import Path
from typing import IO, Any, cast

import torch
import xxhash

from pal_ds.distributed import phase
from pal_ds.engine.checkpoint.torch_archive import (
    CHUNK,
    ForeignObjectError,
    ShardContent,
    foreign_object,
    load_archive,
)
from pal_ds.errors import StorageError, UserError, storage_error, without_stop
from pal_ds.io.fault_points import reached
from pal_ds.io.sealed import FileEntry

SYNCED_AT_ONCE = 1 << 30
"""Bytes of a shard that may wait in the cache."""


class ShardFiles:
    """Stands in for DeepSpeed's checkpoint engine; `failure` is the first write of this rank that went wrong."""

    def __init__(self) -> None:
        self.written: dict[Path, FileEntry] = {}
        self.failure: StorageError | None = None
        self._foreign: list[str] = []

    def save(self, state_dict: object, path: str) -> None:
        """Write one shard to the disk itself, past its cache; a failure is kept for `entries` to raise."""
        if self.failure is not None:
            return
        try:
            with open(path, "wb") as stream:
                shard = _HashedStream(stream)
                torch.save(state_dict, cast(IO[bytes], shard))
                if shard.failure is not None:
                    raise shard.failure
                shard.sync()
        except OSError as error:
            self._note(error, path)
            return
        with torch.serialization.safe_globals(_classes_in_shards()):
            self._foreign += torch.serialization.get_unsafe_globals_in_checkpoint(path)
        try:
            load_archive(Path(path))
        except ForeignObjectError as error:
            self._foreign.append(error.named)
        self.written[Path(path)] = shard.entry()
        reached("a shard written")

    def entries(self, directory: Path) -> dict[str, FileEntry]:
        """Return size and hash of this rank's files, by their names in `directory`.

        Raises:
            StorageError: one of them could not be written.
            UserError: one of them could not be read again, as this version of DeepSpeed or this setting of it puts
                objects into shards that pal_ds does not know. Better told at the first save than at the resume.
        """
        if self.failure is not None:
            raise self.failure
        if self._foreign:
            raise UserError(
                f"{directory}: DeepSpeed wrote {self._foreign[0]} into a shard, which a resume would refuse to read. "
                "Set train.ds_config to one of those that come with pal_ds, and please report this."
            )
        return {str(path.relative_to(directory)): entry for path, entry in self.written.items()}

    def load(self, path: str, map_location: Any = None) -> ShardContent:
        """Read the content of a shard: tensors, plain values and the few classes of DeepSpeed that its shards hold.

        Raises:
            ForeignObjectError: the shard names anything else.
        """
        # Of what torch would allow some take memory without end; costs kilobytes itself.
        load_archive(Path(path))
        try:
            with (
                torch.serialization.safe_globals(_classes_in_shards()),
                io.FileIO(path) as stream,
            ):
                marked = cast(IO[bytes], _MarkedReader(stream))
                return torch.load(marked, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            # The rest of torch's message tells how to read it all the same.
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise foreign_object(path, named[1] if named else "an unknown object") from None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)  # noqa: PTH103 (DeepSpeed gives text)
        except OSError as error:
            self._note(error, path)

    def _note(self, error: OSError, path: str) -> None:
        """Keep the first failure as a StorageError, whatever it was: the ranks must agree on it."""
        known = storage_error(error, path)
        remedy = f"{path}: cannot be written: {without_stop(error)}. Mend this and start again."
        self.failure = self.failure or known or StorageError(remedy)

    # A tag's directory is there as it begins, the manifest says later whether it is whole, and no thread has to end.
    def create(self, info: object) -> None: ...
    def set_commit_info(self, info: object) -> None: ...
    def get_commit_info(self) -> None: ...
    def cleanup(self) -> None: ...

    def commit(self, info: object) -> bool:
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True


class _HashedStream:
    """A binary file for `torch.save`. It never raises: torch would say nothing of why the write failed."""

    def __init__(self, stream: io.BufferedWriter) -> None:
        self._stream = stream
        self._digest = xxhash.xxh3_128()
        self._size = self._num_synced = 0
        self.failure: OSError | None = None

    def write(self, data: bytes | bytearray | memoryview) -> int:
        whole = memoryview(data)
        for begin in range(0, len(whole), CHUNK):
            if self.failure is None:
                self._write(whole[begin : begin + CHUNK])
        reached("inside a shard")
        return len(data)

    def _write(self, data: memoryview) -> None:
        """Write a part of a tensor, which may be as large as the shard."""
        try:
            self._stream.write(data)
            # Else what the cache took in minutes would leave it at the end, at once and without a sign of progress.
            if self._size - self._num_synced > SYNCED_AT_ONCE:
                self.sync()
        except OSError as error:
            self.failure = error
        self._digest.update(data)
        self._size += len(data)
        phase.progress()

    def sync(self) -> None:
        """Bring what was written to the disk itself, past its cache. Raises OSError where it cannot be."""
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._num_synced = self._size

    def flush(self) -> None:
        """Do nothing: the file is flushed once, at its end."""

    def entry(self) -> FileEntry:
        return {"size": self._size, "xxh3_128": self._digest.hexdigest()}


class _MarkedReader:
    """A binary file for `torch.load`, which reads a whole tensor at a time."""

    def __init__(self, stream: io.FileIO) -> None:
        self._stream = stream
        self.seek, self.tell, self.fileno = stream.seek, stream.tell, stream.fileno
        self.readline = stream.readline

    def read(self, size: int = -1) -> bytes:
        phase.progress()
        return self._stream.read(size)

    def readinto(self, buffer: bytearray | memoryview) -> int:
        view = memoryview(buffer).cast("B")
        done = 0
        while num_read := self._stream.readinto(view[done : done + CHUNK]):
            done += num_read
            phase.progress()
        return done


def _classes_in_shards() -> list[Any]:
    """Return the classes that DeepSpeed writes beside tensors and plain values: to make one of them runs nothing."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
