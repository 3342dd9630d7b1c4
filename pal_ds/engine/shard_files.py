"""Writes and reads DeepSpeed's shards: hashed as they are written, no rank left waiting, nothing run on reading.

DeepSpeed saves through an exchangeable object. Its own raises on the one rank whose disk is full, and the others wait
in a barrier; and it reads pickles that may run any code.
"""

import os
import pickle
import re
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import torch
import xxhash

from pal_ds.engine.faults import reached
from pal_ds.engine.torch_archive import foreign_object
from pal_ds.errors import StorageError, UserError, storage_error


class FileEntry(NamedTuple):
    """What the manifest says of a file."""

    size: int
    xxh3_128: str


class ShardFiles:
    """Stands in for DeepSpeed's checkpoint engine; `failure` is the first write of this rank that went wrong."""

    def __init__(self) -> None:
        self.written: dict[Path, FileEntry] = {}
        self.failure: StorageError | None = None
        self._foreign: list[str] = []

    def save(self, state_dict: Any, path: str) -> None:
        """Writes one shard to the disk itself, past its cache; a failure is kept for `entries` to raise."""
        if self.failure is not None:
            return
        try:
            with open(path, "wb") as stream:
                shard = _HashedStream(stream)
                torch.save(state_dict, cast(IO[bytes], shard))
                if shard.failure is not None:
                    raise shard.failure
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            self.failure = _as_told(error, path)
            return
        with torch.serialization.safe_globals(_classes_in_shards()):
            self._foreign += torch.serialization.get_unsafe_globals_in_checkpoint(path)
        self.written[Path(path)] = shard.entry()
        reached("a shard written")

    def entries(self, directory: Path) -> dict[str, dict[str, Any]]:
        """Size and hash of this rank's files, by their names in `directory`.

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
        return {
            str(path.relative_to(directory)): entry._asdict()
            for path, entry in self.written.items()
        }

    def load(self, path: str, map_location: Any = None) -> Any:
        """The content of a shard: tensors, plain values and the few classes of DeepSpeed that its shards hold.

        Raises:
            ForeignObjectError: the shard names anything else.
        """
        try:
            with torch.serialization.safe_globals(_classes_in_shards()):
                return torch.load(path, map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            # The rest of torch's message tells how to read it all the same.
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            raise foreign_object(path, named[1] if named else "an unknown object") from None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            os.makedirs(path, exist_ok=exist_ok)  # noqa: PTH103 (DeepSpeed gives text)
        except OSError as error:
            self.failure = self.failure or _as_told(error, path)

    def create(self, info: Any) -> None:
        """A tag begins; its directory is there already."""

    def commit(self, info: Any) -> bool:
        """A tag ends; the manifest says later whether it is whole."""
        return True

    def is_data_parallel_writer(self, dp_rank: int) -> bool:
        return dp_rank == 0

    def is_decoupled(self) -> bool:
        return False

    def set_commit_info(self, info: Any) -> None:
        """Only for engines that commit later."""

    def get_commit_info(self) -> None:
        return None

    def cleanup(self) -> None:
        """No thread or process of its own."""

    def preserves_storage_sharing(self) -> bool:
        return True


class _HashedStream:
    """A binary file for `torch.save`. It never raises: torch would say nothing of why the write failed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._digest = xxhash.xxh3_128()
        self._size = 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failure is None:
            try:
                self._stream.write(data)
            except OSError as error:
                self.failure = error
            self._digest.update(data)
            self._size += len(data)
            reached("inside a shard")
        return len(data)

    def flush(self) -> None:
        """The file is flushed once, at its end."""

    def entry(self) -> FileEntry:
        return FileEntry(self._size, self._digest.hexdigest())


def _as_told(error: OSError, path: str) -> StorageError:
    """Whatever kept a shard from being written, the ranks must agree on it."""
    told = storage_error(error, path)
    return told or StorageError(f"{path}: cannot be written: {error}. Mend this and start again.")


def _classes_in_shards() -> list[Any]:
    """What DeepSpeed writes beside tensors and plain values: none of these does anything when it is made."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, LossScaler, DynamicLossScaler, fragment_address]
