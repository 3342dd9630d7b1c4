"""Tensors of an exported model under the names of its transformers class, and the safetensors files that hold them.

Files are written one piece of a tensor at a time, whatever the model. The format is public: a 64-bit little-endian
header length, the header as JSON (dtype, shape and byte range of each tensor), the bytes.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pal_ds.errors import UserError
from pal_ds.heads.base import Head
from pal_ds.inference.load_run import OpenRun, load_model, trained_head
from pal_ds.model import RewardModel
from pal_ds.progress import progress_bar

Shapes = dict[str, tuple[int, ...]]
_TRAINED_BACKBONE = "backbone.model."
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
_FORMATS = {torch.float32: ("F32", 4), torch.bfloat16: ("BF16", 2)}


@dataclass(frozen=True)
class Tensors:
    """Backbone tensors by their name in the transformers base model."""

    shapes: Shapes
    read: Callable[[str], Iterator[Tensor]]
    """The values of a tensor in order, in flat pieces, fp32."""


@dataclass(frozen=True)
class Weights(Tensors):
    """Backbone tensors by their name in the transformers base model, and the trained head."""

    head: Head


def weights_of(opened: OpenRun) -> Weights:
    """Stream a backbone that was trained whole; load one that was frozen or adapted.

    Adapters are merged into their matrices in fp32.
    """
    checkpoint = opened.checkpoint
    if opened.parts.backbone is not None and opened.parts.backbone.tuning == "full":
        names = [n for n in checkpoint.names if n.startswith(_TRAINED_BACKBONE)]
        shapes = {n.removeprefix(_TRAINED_BACKBONE): checkpoint.shape(n) for n in names}
        head = trained_head(opened)
        return Weights(shapes, lambda name: checkpoint.pieces(_TRAINED_BACKBONE + name), head)
    model = load_model(opened)
    tensors = dict(plain_backbone(model).state_dict())
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    return Weights(shapes, lambda name: iter([tensors[name].flatten()]), model.head)


def plain_backbone(model: RewardModel) -> torch.nn.Module:
    """Return the transformers model inside a reward model, adapters merged (in place) if it has any."""
    backbone: Any = model.backbone
    inner = backbone.model
    return inner.merge_and_unload() if hasattr(inner, "merge_and_unload") else inner


class Layout(NamedTuple):
    """The class of an exported model, on the meta device, and its tensors."""

    target: PreTrainedModel
    weights: Weights
    prefix: str
    """Before the name of each backbone tensor."""
    head_tensors: dict[str, Tensor]


def write_weights(
    folder: Path, layout: Layout, dtype: str, max_shard_size: str, label: str | None
) -> Callable[[str], Iterator[Tensor]]:
    """Write the tensors of a layout, and return what reads each again; `label` is that of a progress bar."""
    target, weights, prefix, head_tensors = layout
    shapes, read = exported_tensors(target, weights, prefix, head_tensors)
    max_bytes = parse_size(max_shard_size)
    shown = label is not None
    with progress_bar(label or "", len(shapes), shown=shown, unit="tensors") as advance:
        write_sharded(folder, shapes, read, DTYPES[dtype], max_bytes, advance)
    return read


def exported_tensors(
    target: PreTrainedModel, weights: Tensors, backbone_prefix: str, head_tensors: dict[str, Tensor]
) -> tuple[Shapes, Callable[[str], Iterator[Tensor]]]:
    """Return (shapes, read) for `write_sharded` of all tensors of `target` (on the meta device); all must be there.

    Raises:
        UserError: a tensor is missing, empty, of another shape, or has no place in the target.
    """
    tied = set(getattr(target, "all_tied_weights_keys", None) or ())
    wanted = {n: tuple(t.shape) for n, t in target.state_dict().items() if n not in tied}
    given = {f"{backbone_prefix}{n}": shape for n, shape in weights.shapes.items()}
    given |= {n: tuple(t.shape) for n, t in head_tensors.items()}
    for name, shape in wanted.items():
        if given.get(name) != shape or 0 in shape:
            raise UserError(
                f"{name}: the exported model needs shape {shape}, and was given {given.get(name)}."
            )
    if surplus := sorted(set(given) - set(wanted) - tied):
        raise UserError(f"{surplus[0]}: was given, and the exported model has no such tensor.")

    def read(name: str) -> Iterator[Tensor]:
        if name in head_tensors:
            return iter([head_tensors[name].flatten()])
        return weights.read(name.removeprefix(backbone_prefix))

    return wanted, read


def write_sharded(
    folder: Path,
    shapes: Shapes,
    read: Callable[[str], Iterator[Tensor]],
    dtype: torch.dtype,
    max_shard_bytes: int,
    advance: Callable[..., None] = lambda *_, **__: None,
) -> None:
    """Write every tensor of `shapes`, in that order, as transformers names sharded weights.

    `read` gives the values of a tensor in order, in pieces of any float dtype, none empty; `advance` is called after
    each tensor. A file ends before the tensor that would take it past `max_shard_bytes`.

    Raises:
        UserError: a tensor has more or fewer values than announced, or one that is not finite.
    """
    size = _FORMATS[dtype][1]
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
    code, size = _FORMATS[dtype]
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
                # The extremes hold any infinity and any NaN; `isfinite` would take fresh memory for its answers.
                if not torch.stack(torch.aminmax(values)).isfinite().all():
                    raise UserError(
                        f"{name} holds values that are not finite: the training diverged. Export an earlier step "
                        "(--step)."
                    )
                flat = values.detach().to(dtype).contiguous().view(-1)
                stream.write(flat.view(torch.uint8).numpy().data)
                num_values += len(flat)
            if num_values != math.prod(shape):
                raise UserError(f"{name} has {num_values} values, the exported model has {shape}.")
            advance(1)


def parse_size(text: str) -> int:
    """Return the bytes of `--max_shard_size`. Raises UserError for anything but a number and a unit.

    >>> parse_size("500 MB")
    500000000
    """
    found = re.fullmatch(r"(\d+)\s*(KB|MB|GB)", text)
    if found is None or int(found[1]) == 0:
        raise UserError(f"--max_shard_size {text}: must be a number and KB, MB or GB, as in 4GB.")
    return int(found[1]) * _UNITS[found[2]]
