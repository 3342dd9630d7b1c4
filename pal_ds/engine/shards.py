"""The weights in DeepSpeed's shards as whole fp32 tensors, one at a time, without DeepSpeed.

What ZeRO writes (facts of DeepSpeed 0.19): every rank has `*_optim_states.pt` with its part of the
fp32 masters as flat vectors, and `*_model_states.pt` names the parameters, in the order in which
they were laid into those vectors.
    stage 3     each parameter is cut into `world` equal slices, the last one padded; a rank's
                slices follow one another over its `fp32_flat_groups`
    stages 1, 2 each group's parameters follow one another in one vector, which is cut over the
                ranks into `single_partition_of_fp32_groups`
    stage 0     the whole module lies in `mp_rank_00_model_states.pt`
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pal_ds.engine.torch_archive import StoredTensor, load_archive
from pal_ds.errors import UserError
from pal_ds.heads.shapes import Float

ENGINE_FOLDER = "engine"


class _Segment(NamedTuple):
    """Elements [start, start + num_values) of a flat stored tensor."""

    source: StoredTensor
    start: int
    num_values: int


class _Layout(NamedTuple):
    """Where one tensor lies: its shape and the segments that follow one another to make it."""

    shape: tuple[int, ...]
    segments: tuple[_Segment, ...]


class ShardedCheckpoint:
    """Trainable parameters (and floating buffers) of a `step_N/` directory by name.

    Frozen parameters are not in a step. Tied parameters appear under each of their names. Verify
    the directory first (`engine.checkpoint.verify_checkpoint`): here only layout is checked.

    Raises:
        UserError: files are missing, unreadable, hold foreign objects, or their sizes disagree.
    """

    def __init__(self, path: Path) -> None:
        self.path = path / ENGINE_FOLDER
        models = self._load("model_states")
        if not models:
            raise UserError(
                f"{self.path}: no *_model_states.pt here. A checkpoint is a step_N directory that "
                "`train` wrote."
            )
        self._layouts: dict[str, _Layout] = {}
        self._whole: dict[str, StoredTensor] = {}
        optims = self._load("optim_states")
        flats = [shard.get("optimizer_state_dict") or {} for shard in optims]
        if flats and "fp32_flat_groups" in flats[0]:
            self._read_stage3(models, flats)
        elif flats and "single_partition_of_fp32_groups" in flats[0]:
            self._read_stage12(models[0], flats)
        else:
            module = models[0]["module"]
            self._whole |= {name: t for name, t in module.items() if t.is_floating_point}
        self._add_buffers(models[0])
        self._add_tied(models[0])

    @property
    def names(self) -> list[str]:
        """Names as in the trained module: `backbone...`, `head...`."""
        return [*self._layouts, *self._whole]

    def __contains__(self, name: object) -> bool:
        return name in self._layouts or name in self._whole

    def shape(self, name: str) -> tuple[int, ...]:
        layout = self._layouts.get(name)
        return self._whole[name].shape if layout is None else layout.shape

    def tensor(self, name: str) -> Float[Tensor, "..."]:
        """The whole tensor, fp32, assembled now. Raises KeyError for a name that is not there."""
        layout = self._layouts.get(name)
        if layout is None:
            return self._whole[name].read().float()
        numel = math.prod(layout.shape)
        values = torch.empty(numel)
        filled = 0
        for source, start, count in layout.segments:
            count = min(count, numel - filled)
            if count > 0:
                values[filled : filled + count] = source.read_flat(start, count)
                filled += count
        if filled != numel:
            raise UserError(
                f"{self.path}: {name} has {filled} of its {numel} values in the shards."
            )
        return values.view(layout.shape)

    def items(self) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
        """(name, tensor) one after the other; only the current one is in memory."""
        return ((name, self.tensor(name)) for name in self.names)

    def _load(self, kind: str) -> list[dict[str, Any]]:
        """All files of a kind in rank order."""
        files = sorted(self.path.glob(f"*_{kind}.pt"), key=lambda file: _numbers(file.name))
        return [load_archive(file) for file in files]

    def _check_ranks(self, flats: list[dict[str, Any]], num_expected: Any) -> None:
        num_ranks = max(num_expected) if isinstance(num_expected, list) else num_expected
        if isinstance(num_ranks, int) and num_ranks != len(flats):
            raise UserError(
                f"{self.path}: {num_ranks} ranks wrote this checkpoint, but {len(flats)} files "
                "*_optim_states.pt are here."
            )

    def _read_stage3(self, models: list[dict[str, Any]], flats: list[dict[str, Any]]) -> None:
        self._check_ranks(flats, flats[0].get("partition_count"))
        world_size = len(flats)
        vectors = [_as_list(flat["fp32_flat_groups"]) for flat in flats]
        offset = 0
        for shapes in models[0]["param_shapes"]:
            for name, shape in shapes.items():
                width = -(-math.prod(shape) // world_size)
                parts = (part for rank in vectors for part in _cut(rank, offset, width))
                self._layouts[name] = _Layout(tuple(shape), tuple(parts))
                offset += width
        available = sum(vector.numel for vector in vectors[0])
        if offset != available:
            self._refuse_layout(offset, available)

    def _read_stage12(self, model: dict[str, Any], flats: list[dict[str, Any]]) -> None:
        self._check_ranks(flats, flats[0].get("partition_count"))
        parts = [_as_list(flat["single_partition_of_fp32_groups"]) for flat in flats]
        paddings = flats[0].get("param_alignment_paddings")
        for group, shapes in enumerate(model["param_shapes"]):
            vector = [rank[group] for rank in parts]
            offset = 0
            for index, (name, shape) in enumerate(shapes.items()):
                numel = math.prod(shape)
                self._layouts[name] = _Layout(tuple(shape), tuple(_cut(vector, offset, numel)))
                offset += numel + (paddings[group][index] if paddings else 0)
            available = sum(part.numel for part in vector)
            # The whole is padded to a multiple of twice the number of ranks.
            if not 0 <= available - offset < 2 * len(flats):
                self._refuse_layout(offset, available)

    def _refuse_layout(self, wanted: int, available: int) -> None:
        raise UserError(
            f"{self.path}: parameters need {wanted} values per shard and the shards hold "
            f"{available}: files of different checkpoints are mixed, or DeepSpeed's format changed."
        )

    def _add_buffers(self, model: dict[str, Any]) -> None:
        for name in model.get("buffer_names") or ():
            value = model["module"].get(name)
            if value is not None and value.is_floating_point:
                self._whole[name] = value

    def _add_tied(self, model: dict[str, Any]) -> None:
        for alias, name in (model.get("shared_params") or {}).items():
            if name in self._layouts and alias not in self._layouts:
                self._layouts[alias] = self._layouts[name]


def _cut(vectors: list[StoredTensor], offset: int, count: int) -> Iterator[_Segment]:
    """Segments of [offset, offset + count) of the vectors laid end to end."""
    begin = 0
    for vector in vectors:
        low, high = max(offset, begin), min(offset + count, begin + vector.numel)
        if low < high:
            yield _Segment(vector, low - begin, high - low)
        begin += vector.numel


def _as_list(value: Any) -> list[StoredTensor]:
    # A StoredTensor is a tuple itself: one flat vector may stand without a list around it.
    return [value] if isinstance(value, StoredTensor) else list(value)


def _numbers(name: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", name)]
