"""Reads what `torch.save` wrote without running it; tensors stay on disk until a slice is wanted.

A pickle names the functions that rebuild its objects. Here each name that a DeepSpeed shard uses
stands for a harmless one of ours, and any other name is refused, so a shard cannot run code; of
Python's own types none can be called, whose arguments could ask for any amount of memory.
Tensors are placeholders that know their bytes' place in the file, and lie within it: opening a
shard of any size costs kilobytes, and what has been read is never kept by the page tables of this
process.
"""

import io
import math
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pal_ds.distributed import phase
from pal_ds.engine.checkpoint.archive_limits import check_opcodes, check_records
from pal_ds.engine.checkpoint.archive_objects import MOST_ARGUMENTS, Builder, Inert, Mapping
from pal_ds.errors import UserError
from pal_ds.io.boundary import reading

ShardContent = dict[str, Any]
"""Content of one of DeepSpeed's shards, or a mapping inside it: names and values are DeepSpeed's own."""
CHUNK = 1 << 24
"""Bytes that are read or written at a time, so that a large tensor shows progress."""
MOST_DIMENSIONS = 64
"""Dimensions of a tensor, as many as torch itself allows."""
_LOCAL_HEADER = struct.Struct("<26xHH")
_DEEPSPEED = {
    ("deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler"),
    ("deepspeed.runtime.fp16.loss_scaler", "LossScaler"),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"),
    ("deepspeed.utils.tensor_fragment", "fragment_address"),
}
"""The classes that DeepSpeed writes beside tensors and plain values."""
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class ForeignObjectError(UserError):
    """A shard asks for an object that pal_ds never writes. That is no accident, so no older checkpoint takes over."""

    named = ""
    """What it asks for."""


def foreign_object(path: Path | str, name: str) -> ForeignObjectError:
    """Return the refusal of a shard that names something which reading it would run."""
    error = ForeignObjectError(
        f"{path}: names {name}, which no checkpoint of pal_ds holds; reading it would run foreign "
        "code, so it is not read. Find out who wrote it, and delete this step."
    )
    error.named = name
    return error


class Storage(NamedTuple):
    """A run of elements in an uncompressed record of an archive."""

    path: Path
    begin: int
    """Place of the first element, in bytes from the file's start."""
    num_elements: int
    dtype: torch.dtype


class StoredTensor(NamedTuple):
    """A tensor that still lies in its file."""

    storage: Storage
    offset: int
    """Place of the first element, in elements from the storage's start."""
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_floating_point(self) -> bool:
        return self.storage.dtype.is_floating_point

    def read(self) -> Tensor:
        """Read the tensor, in the dtype it was stored in."""
        if self.stride == _contiguous_stride(self.shape):
            return self.read_flat(0, self.numel).view(self.shape)
        whole = StoredTensor(self.storage, 0, (self.storage.num_elements,), (1,)).read()
        return whole.as_strided(self.shape, self.stride, self.offset).contiguous()

    def read_flat(self, start: int, count: int) -> Tensor:
        """Read elements [start, start + count) of a contiguous tensor, flattened."""
        values = torch.empty(count, dtype=self.storage.dtype)
        self.read_into(values, start)
        return values

    def read_into(self, values: Tensor, start: int) -> None:
        """Fill `values`, contiguous and of the stored dtype, with the elements from `start` of a contiguous tensor."""
        if values.numel():
            with open(self.storage.path, "rb", buffering=0) as stream:
                stream.seek(self.storage.begin + (self.offset + start) * values.element_size())
                _fill(stream, values.view(torch.uint8).numpy().data, self.storage.path)


def load_archive(path: Path) -> ShardContent:
    """Read the mapping that `torch.save` wrote to `path`, its tensors as `StoredTensor`.

    Raises:
        ForeignObjectError: a pickle with names that no DeepSpeed shard uses.
        UserError: no torch archive, or damaged.
    """
    remedy = "Take another checkpoint of the run (--step)."
    with (
        reading(path, "torch archive", remedy),
        zipfile.ZipFile(path) as archive,
        open(path, "rb") as stream,
    ):
        names = archive.namelist()
        check_records(archive, path.stat().st_size)
        root = next(n for n in names if n.endswith("/data.pkl")).removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise UserError(f"{path}: written on a big-endian machine, which is not supported.")
        program = archive.read(f"{root}data.pkl")
        check_opcodes(program)
        return _Unpickler(path, archive, stream, root, program).load()


class _Unpickler(pickle.Unpickler):
    """Rebuilds containers, numbers and tensor placeholders; everything else is inert or refused."""

    def __init__(
        self,
        path: Path,
        archive: zipfile.ZipFile,
        stream: io.BufferedReader,
        root: str,
        program: bytes,
    ) -> None:
        super().__init__(io.BytesIO(program))
        self.path, self.archive, self.stream, self.root = path, archive, stream, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _BUILDERS:
            return _BUILDERS[module, name]
        if module in ("torch", "torch.storage"):
            if name in _STORAGES:
                return _STORAGES[name]
            if isinstance(getattr(torch, name, None), torch.dtype):
                return getattr(torch, name)
            if name in ("Tensor", "device"):
                return Inert
        if (module, name) in _DEEPSPEED:
            return Inert
        raise foreign_object(self.path, f"{module}.{name}")

    def persistent_load(self, pid: tuple) -> Storage:
        kind, dtype, key, _, num_elements = pid
        sound = isinstance(dtype, torch.dtype) and type(num_elements) is int and num_elements >= 0
        if kind != "storage" or not sound:
            raise pickle.UnpicklingError(f"unknown reference {kind!r}")
        record = self.archive.getinfo(f"{self.root}data/{key}")
        size = num_elements * torch.empty(0, dtype=dtype).element_size()
        if record.file_size != size:
            raise pickle.UnpicklingError(f"record {key} has {record.file_size} bytes, not {size}")
        # The local header repeats the name and may pad: only it says where the bytes begin.
        self.stream.seek(record.header_offset)
        name_length, extra_length = _LOCAL_HEADER.unpack(self.stream.read(_LOCAL_HEADER.size))
        begin = record.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        return Storage(self.path, begin, num_elements, dtype)


def _mapping() -> Mapping:
    """Stands for OrderedDict, called as `torch.save` calls it. Raises TypeError for arguments, which it would copy."""
    return Mapping()


def _check_shape(shape: object) -> None:
    """Raise UnpicklingError for what is no tuple of a few whole numbers: anything else would be copied at each use."""
    if not isinstance(shape, tuple) or len(shape) > MOST_DIMENSIONS:
        raise pickle.UnpicklingError("a shape that is none")
    if any(type(n) is not int or n < 0 for n in shape):
        raise pickle.UnpicklingError("a shape that is none")


def _rebuild_tensor(
    storage: Storage, offset: int, shape: tuple, stride: tuple, *_: object
) -> StoredTensor:
    """Raise UnpicklingError for a tensor that is no part of its storage, or has more elements than that."""
    _check_shape(shape)
    _check_shape(stride)
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or any(type(n) is not int or n < 0 for n in numbers):
        raise pickle.UnpicklingError("a tensor that is no part of a record")
    tensor = StoredTensor(storage, offset, shape, stride)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if tensor.numel > storage.num_elements or (tensor.numel and last >= storage.num_elements):
        raise pickle.UnpicklingError(
            f"a tensor of shape {shape} in a record of {storage.num_elements} elements"
        )
    return tensor


def _size(dimensions: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Stands for torch.Size."""
    _check_shape(dimensions)
    return dimensions


def _rebuild_parameter(data: StoredTensor, *_: object) -> StoredTensor:
    return data


def _rebuild_from_type(rebuild: object, _: object, arguments: object, __: object) -> object:
    known = (_rebuild_tensor, _rebuild_parameter)
    if not isinstance(rebuild, Builder) or rebuild.call not in known:
        raise pickle.UnpicklingError("a tensor of an unknown kind")
    if not isinstance(arguments, tuple) or len(arguments) > MOST_ARGUMENTS:
        raise pickle.UnpicklingError("a tensor of an unknown kind")
    return rebuild(*arguments)


_BUILDERS = {
    ("collections", "OrderedDict"): Builder(_mapping),
    ("torch", "Size"): Builder(_size),
    ("torch._utils", "_rebuild_tensor"): Builder(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Builder(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): Builder(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Builder(_rebuild_parameter),
    ("torch._tensor", "_rebuild_from_type_v2"): Builder(_rebuild_from_type),
}
"""The functions of a shard's pickle, by module and name there."""


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _fill(stream: io.FileIO, view: memoryview, path: Path) -> None:
    done = 0
    while done < len(view):
        num_read = stream.readinto(view[done : done + CHUNK])
        phase.progress()
        if not num_read:
            raise UserError(
                f"{path}: ends before its tensors do; take another checkpoint (--step)."
            )
        done += num_read
