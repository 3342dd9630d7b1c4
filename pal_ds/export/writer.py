"""Writing of safetensors, one piece of a tensor at a time, whatever the model.

The format is public: a 64-bit little-endian header length, the header as JSON (dtype, shape and
byte range of each tensor), the bytes.
"""

import json
import math
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from pal_ds.errors import UserError

Shapes = dict[str, tuple[int, ...]]
_DTYPES = {torch.float32: ("F32", 4), torch.bfloat16: ("BF16", 2)}


def write_sharded(
    folder: Path,
    shapes: Shapes,
    read: Callable[[str], Iterator[Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int,
    advance: Callable[..., None] = lambda *_, **__: None,
) -> None:
    """Write every tensor of `shapes`, in that order, as transformers names sharded weights.

    Args:
        folder: where the files go.
        shapes: what will be written; `read` must give exactly so many values.
        read: the values of a tensor of that name in order, in pieces of any float dtype, none empty.
        dtype: of the files: torch.float32 or torch.bfloat16.
        max_shard_bytes: a file ends before the tensor that would take it past this.
        advance: called after each tensor.

    Raises:
        UserError: a tensor has more or fewer values than announced, or one that is not finite.
    """
    size = _DTYPES[dtype][1]
    files = list(_split(shapes, size, max_shard_bytes))
    weight_map = {}
    for number, names in enumerate(files, start=1):
        name = "model.safetensors"
        if len(files) > 1:
            name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _write_file(folder / name, {n: shapes[n] for n in names}, read, dtype, advance)
        weight_map |= dict.fromkeys(names, name)
    if len(files) > 1:
        total = sum(math.prod(shape) for shape in shapes.values()) * size
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


def _split(shapes: Shapes, size: int, max_bytes: int) -> Iterator[list[str]]:
    """Return the names of the tensors of each file."""
    names: list[str] = []
    filled = 0
    for name, shape in shapes.items():
        num_bytes = math.prod(shape) * size
        if names and filled + num_bytes > max_bytes:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += num_bytes
    yield names


def _write_file(
    path: Path,
    shapes: Shapes,
    read: Callable[[str], Iterator[Tensor]],
    dtype: torch.dtype,
    advance: Callable[..., None],
) -> None:
    code, size = _DTYPES[dtype]
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * size
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            num_values = 0
            for values in read(name):
                _check_finite(name, values)
                flat = values.detach().to(dtype).contiguous().view(-1)
                stream.write(flat.view(torch.uint8).numpy().data)
                num_values += len(flat)
            if num_values != math.prod(shape):
                raise UserError(f"{name} has {num_values} values, the exported model has {shape}.")
            advance(1)


def _check_finite(name: str, values: Tensor) -> None:
    # The extremes hold any infinity and any NaN; `isfinite` would take fresh memory for its answers.
    if not torch.stack(torch.aminmax(values)).isfinite().all():
        raise UserError(
            f"{name} holds values that are not finite: the training diverged. Export an "
            "earlier step (--step)."
        )
