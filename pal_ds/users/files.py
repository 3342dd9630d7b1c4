"""User tables on disk, written and read in blocks of rows: users.safetensors (values, Adam state), users.arrow (ids).

The files are the same whether one rank held the table or many, and no more than a block is ever copied.
"""

import json
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from torch import Tensor

from pal_ds.errors import UserError
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.io.arrow import values_of
from pal_ds.io.boundary import reading
from pal_ds.users.config import SCALARS, Scalar
from pal_ds.users.ids import UserIds
from pal_ds.users.rows import UserRows, blocks

USER_FILES = ("users.safetensors", "users.arrow")
"""Names of a table's files."""
_FORMAT = "pal_ds.users/1"
_NAMES = ("step", "exp_avg", "exp_avg_sq", "logits")
"""Tensors in the order of the file, int64 before fp32, so that each begins where its dtype asks for; behind them, in a
table that has any, the logarithms of users' scalars."""
_INDEX = pa.schema([("id", pa.string()), ("row", pa.int64()), ("seen", pa.bool_())])
_IDS_PER_BATCH = 2**20

ReadBlock = Callable[[int, int], Float[Tensor, "n R"]]
"""Records [begin, end) of a table, on the CPU."""


def write_users(
    directory: Path | None,
    ids: UserIds,
    seed: int,
    rows: UserRows,
    read_block: ReadBlock,
) -> None:
    """Writes both files, asking for each block once, in order; without a directory it only asks.

    A sharded table needs all its ranks to read a block, so each asks for all of them whatever happens to the one that
    writes. `rows` are some of the table's.
    """
    pending = iter(blocks(len(ids)))
    try:
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        header, starts = _header(_shapes(len(ids), rows.num_prototypes, rows.scalars), seed)
        seen = np.zeros(len(ids), bool)
        with open(directory / USER_FILES[0], "wb") as stream:
            stream.write(header)
            for begin, end in pending:
                block = rows.of(read_block(begin, end))
                seen[begin:end] = block.seen.bool().numpy()
                for name, start in starts.items():
                    values = getattr(block, name)
                    values = values.long() if name == "step" else values.contiguous()
                    stream.seek(start + begin * values.element_size() * values[:1].numel())
                    stream.write(memoryview(values.numpy()).cast("B"))
        _write_index(directory / USER_FILES[1], ids, seen)
    finally:
        for begin, end in pending:
            read_block(begin, end)


def _shapes(
    num_users: int, num_prototypes: int, scalars: tuple[Scalar, ...]
) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a table, in the order of the file."""
    wide = num_users, num_prototypes + len(scalars)
    shapes = ((num_users,), wide, wide, (num_users, num_prototypes))
    own = {f"log_{name}": (num_users,) for name in scalars}
    return dict(zip(_NAMES, shapes, strict=True)) | own


def _header(shapes: dict[str, tuple[int, ...]], seed: int) -> tuple[bytes, dict[str, int]]:
    """The head of a safetensors file, and where each tensor begins in it."""
    fields: dict[str, dict[str, object]] = {"__metadata__": {"format": _FORMAT, "seed": str(seed)}}
    ends = [0]
    for name, shape in shapes.items():
        dtype = "I64" if name == "step" else "F32"
        ends.append(ends[-1] + int(np.prod(shape)) * (8 if dtype == "I64" else 4))
        fields[name] = {"dtype": dtype, "shape": shape, "data_offsets": ends[-2:]}
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    starts = {name: begin + end for name, end in zip(shapes, ends, strict=False)}
    return len(text).to_bytes(8, "little") + text, starts


def _write_index(path: Path, ids: UserIds, seen: np.ndarray) -> None:
    with pa.ipc.new_file(str(path), _INDEX) as writer:
        for begin in range(0, max(len(ids), 1), _IDS_PER_BATCH):
            part = ids[begin : begin + _IDS_PER_BATCH]
            rows = np.arange(begin, begin + len(part))
            columns = [part.to_arrow(), pa.array(rows), pa.array(seen[rows])]
            writer.write_batch(pa.record_batch(columns, schema=_INDEX))


class StoredUsers:
    """A table on disk: who is in it, and its rows when they are asked for."""

    def __init__(self, directory: Path | str):
        """Raises UserError where files are missing, foreign or disagree."""
        self._path, index_path = (Path(directory) / name for name in USER_FILES)
        for path in (self._path, index_path):
            if not path.is_file():
                raise UserError(
                    f"{path} is missing; a user table is users.safetensors and users.arrow."
                )
        with self._reading():
            self._open(index_path)

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self._path.parent, "user table", "Copy it again, or fit it again.")

    def _open(self, index_path: Path) -> None:
        with safe_open(str(self._path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{self._path} is not a user table of format {_FORMAT}.")
            self.scalars = _scalars_in(set(file.keys()))
            names = (*_NAMES, *(f"log_{name}" for name in self.scalars))
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        self.seed, self.num_prototypes = int(metadata["seed"]), shapes["logits"][1]
        # Read, not mapped: what takes the file's place must not change the ids in memory.
        with pa.OSFile(str(index_path)) as source, pa.ipc.open_file(source) as reader:
            index = reader.read_all()
        index.validate(full=True)
        if not index.schema.equals(_INDEX) or index["id"].null_count:
            raise ValueError(f"{index_path.name} holds other columns, or a user without an id")
        if not np.array_equal(values_of(index["row"]), np.arange(len(index))):
            raise UserError(f"{index_path}: column row is not 0 .. users - 1: the file is damaged.")
        self.ids, self._seen = UserIds.from_arrow(index["id"]), values_of(index["seen"])
        check_shapes(shapes, len(self.ids), self.num_prototypes)
        if self.ids.repeated():
            raise UserError("users: an id occurs twice in the stored table: its files are damaged.")

    def __len__(self) -> int:
        return len(self.ids)

    def refuse_removed(self, ids: UserIds) -> None:
        """Raises UserError where a table of `ids` is to be restored and not all of them are stored."""
        if ids != self.ids and (gone := ids.missing_from(self.ids)):
            raise UserError(
                f"{self._path.parent}: user {gone[0]!r} was removed from this run, and the data still hold their "
                f"comparisons ({len(gone)} such users). Prepare the data without them and start in another --run_dir."
            )

    def read(self, rows: UserRows, first: int = 0) -> UserRows:
        """Fills `rows` with the stored ones from `first` on, reading only those.

        Raises:
            UserError: K disagrees, or one of the two has a scalar of users that the other has not.
        """
        shapes = {"logits": (len(self), self.num_prototypes)}
        check_shapes(shapes, len(self), rows.num_prototypes)
        for name in SCALARS:
            stored, here = name in self.scalars, name in rows.scalars
            if stored != here:
                raise UserError(
                    f"{self._path.parent}: its users have {'a' if stored else 'no'} {name.replace('_', ' ')}, and "
                    f"users.{name} is {'learnt' if here else 'none'} here. Set it to what it was."
                )
        with self._reading(), safe_open(str(self._path), "pt") as file:
            slices = {name: file.get_slice(name) for name in rows.tensors if name != "seen"}
            for begin, end in blocks(len(rows)):
                for name, tensor in slices.items():
                    getattr(rows, name)[begin:end] = tensor[first + begin : first + end]
                seen = torch.from_numpy(self._seen[first + begin : first + end].astype(np.int32))
                rows.seen[begin:end] = seen
                values = rows.records[begin:end, : rows.num_values]
                self._refuse_non_finite(values, first + begin)
        return rows

    def _refuse_non_finite(self, values: Float[Tensor, "n V"], first: int) -> None:
        bad = (~torch.isfinite(values).all(1)).nonzero()
        if len(bad):
            user = self.ids[first + int(bad[0])]
            raise UserError(
                f"{self._path}: the logits of user {user!r} are no finite numbers ({len(bad)} such users): the file is "
                "damaged. Copy it again, or fit its users again."
            )


def _scalars_in(names: Collection[str]) -> tuple[Scalar, ...]:
    """Scalars whose logarithms are among these tensors."""
    return tuple(scalar for scalar in SCALARS if f"log_{scalar}" in names)


def check_shapes(shapes: dict[str, tuple[int, ...]], num_users: int, num_prototypes: int) -> None:
    """Raises UserError unless the tensors are those of so many users and prototypes."""
    expected_of = _shapes(num_users, num_prototypes, _scalars_in(shapes.keys()))
    expected_of["seen"] = expected_of["step"]
    for name, shape in shapes.items():
        expected = expected_of[name]
        if shape != expected:
            raise UserError(
                f"users: {name} is {shape}, expected {expected} (users, prototypes): the table "
                "belongs to a head with another num_prototypes, or its files are damaged."
            )
