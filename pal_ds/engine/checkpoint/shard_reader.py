"""Weights and optimizer moments in DeepSpeed's shards as whole fp32 tensors, one at a time, without DeepSpeed.

What ZeRO writes (facts of DeepSpeed 0.19): every rank has `*_optim_states.pt` with its part of the
fp32 masters as flat vectors, and `*_model_states.pt` names the parameters, in the order in which
they were laid into those vectors.
    stage 3     each parameter is cut into `world` equal slices, the last one padded; a rank's
                slices follow one another over its `fp32_flat_groups`
    stages 1, 2 each group's parameters follow one another in one vector, which is cut over the
                ranks into `single_partition_of_fp32_groups`
    stage 0     the whole module lies in `mp_rank_00_model_states.pt`
The optimizer sees each vector as one parameter, so its moments are cut as the masters are.
"""

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pal_ds.engine.checkpoint.torch_archive import ShardContent, StoredTensor, load_archive
from pal_ds.engine.ds_config import DeepSpeedConfig
from pal_ds.engine.optim import ParamGroup
from pal_ds.errors import UserError
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.io.boundary import reading

ENGINE_FOLDER = "engine"
Kind = Literal["master", "exp_avg", "exp_avg_sq"]
"""The fp32 weights, and Adam's first and second moment of them."""
PIECE = 1 << 18
"""Values of 1 MiB: a processor still holds what it has just read when it looks at it and writes it."""
MOMENTS: tuple[Kind, ...] = ("exp_avg", "exp_avg_sq")


class _Segment(NamedTuple):
    """Elements [start, start + num_values) of a rank's part of a vector."""

    rank: int
    start: int
    num_values: int


class _Place(NamedTuple):
    """The place of one parameter: its shape, its vector and the segments that follow one another to make it."""

    shape: tuple[int, ...]
    vector: int
    segments: tuple[_Segment, ...]


class ShardedCheckpoint:
    """Trainable parameters (and floating buffers) of a `step_N/` directory by name.

    Frozen parameters are not in a step. Tied parameters appear under each of their names. Verify
    the directory first (`engine.checkpoint.verify_checkpoint`): here only layout is checked.

    Raises:
        UserError: files are missing, unreadable, hold foreign objects, or their sizes disagree.
    """

    groups: list[dict[str, tuple[int, ...]]]
    """Names and shapes of each parameter group, in the order in which the shards hold them; none at stage 0."""
    param_groups: list[ParamGroup]
    """Settings that the optimizer stored of each parameter group (rates, name), without parameters; none at stage 0."""

    def __init__(self, path: Path) -> None:
        self.path = path / ENGINE_FOLDER
        with reading(self.path, "checkpoint of DeepSpeed", "Take another of the run (--step)."):
            self._open()

    def _open(self) -> None:
        models = self._load("model_states")
        if not models:
            raise UserError(
                f"{self.path}: no *_model_states.pt here. A checkpoint is a step_N directory that `train` wrote."
            )
        self.model_states = models
        """The content of `*_model_states.pt`, in rank order; tensors as `StoredTensor`."""
        self.ds_config: DeepSpeedConfig = models[0].get("ds_config") or {}
        self.world_size = int(models[0]["dp_world_size"])
        self.groups, self.param_groups = [], []
        self._places: dict[str, _Place] = {}
        self._whole: dict[str, StoredTensor] = {}
        self._masters: list[list[StoredTensor]] = []
        self._states: list[list[ShardContent]] = []
        flats = [shard.get("optimizer_state_dict") or {} for shard in self._load("optim_states")]
        module = models[0]["module"]
        if flats and flats[0].keys() & {"fp32_flat_groups", "single_partition_of_fp32_groups"}:
            self._read_vectors(models[0], flats)
        else:
            self._whole |= {name: t for name, t in module.items() if t.is_floating_point}
        buffers = {name: module.get(name) for name in models[0].get("buffer_names") or ()}
        self._whole |= {n: t for n, t in buffers.items() if t is not None and t.is_floating_point}
        for alias, name in (models[0].get("shared_params") or {}).items():
            if name in self._places:
                self._places.setdefault(alias, self._places[name])

    @property
    def names(self) -> list[str]:
        """Names of all tensors, as in the trained module: `backbone...`, `head...`."""
        return [*self._places, *self._whole]

    @property
    def trained(self) -> list[str]:
        """Names of trainable parameters, tied ones under each of theirs; none at stage 0."""
        return list(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places or name in self._whole

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor. Raises KeyError where there is no such name."""
        place = self._places.get(name)
        return self._whole[name].shape if place is None else place.shape

    def tensor(self, name: str, kind: Kind = "master") -> Float[Tensor, "..."]:
        """Assemble and return the whole tensor, fp32.

        Raises:
            KeyError: there is no such name, or no moment of it.
        """
        place = self._places.get(name)
        if place is None and kind == "master":
            return self._whole[name].read().float()
        shape = self._places[name].shape
        return self.read(name, 0, math.prod(shape), kind).view(shape)

    def pieces(self, name: str) -> Iterator[Float[Tensor, "n"]]:
        """Yield the values of a flattened tensor, fp32, PIECE at a time; raises as `tensor` does."""
        if name in self._whole:
            yield self._whole[name].read().float().flatten()
            return
        num_values = math.prod(self.shape(name))
        for start in range(0, num_values, PIECE):
            yield self.read(name, start, min(PIECE, num_values - start))

    def read(
        self, name: str, start: int, num_values: int, kind: Kind = "master"
    ) -> Float[Tensor, "n"]:
        """Read values [start, start + num_values) of a flattened trainable parameter or of a moment of it, fp32.

        Raises:
            KeyError: there is no such name, or no moment of it.
            UserError: the shards do not hold so many values of it.
        """
        place = self._places[name]
        values = torch.empty(num_values)
        begin = filled = 0
        for rank, offset, length in place.segments:
            low, high = max(start, begin), min(start + num_values, begin + length)
            if low < high:
                source = self._vector(rank, place.vector, kind)
                part, first = values[low - start : high - start], offset + low - begin
                if source.storage.dtype == values.dtype:
                    # Fresh memory costs more than the bytes that come into it: no copy on the way.
                    source.read_into(part, first)
                else:
                    part.copy_(source.read_flat(first, high - low))
                filled += high - low
            begin += length
        if filled != num_values:
            raise UserError(
                f"{self.path}: {name} has {filled} of its {num_values} values in the shards."
            )
        return values

    def step(self, name: str) -> float | None:
        """Return how many updates the optimizer has made of a trainable parameter; None where it has no moments of it.

        Raises:
            KeyError: there is no such name.
        """
        value = self._states[0][self._places[name].vector].get("step")
        return float(value.read()) if isinstance(value, StoredTensor) else value

    def state_names(self) -> set[str]:
        """Return the names of the optimizer's states of a parameter: `step`, `exp_avg`, `exp_avg_sq` under Adam."""
        return {name for states in self._states for state in states for name in state}

    def _vector(self, rank: int, vector: int, kind: Kind) -> StoredTensor:
        if kind == "master":
            return self._masters[rank][vector]
        return self._states[rank][vector][kind]

    def items(self) -> Iterator[tuple[str, Float[Tensor, "..."]]]:
        """Yield (name, tensor) one after the other; only the current one is in memory."""
        return ((name, self.tensor(name)) for name in self.names)

    def _load(self, kind: str) -> list[ShardContent]:
        """Read all files of a kind, in rank order."""
        files = self.path.glob(f"*_{kind}.pt")
        in_order = sorted(files, key=lambda file: list(map(int, re.findall(r"\d+", file.name))))
        return [load_archive(file) for file in in_order]

    def _read_vectors(self, model: ShardContent, flats: list[ShardContent]) -> None:
        """Find the parameters in the ranks' vectors: in equal slices (stage 3), or end to end (stages 1 and 2)."""
        num_expected = flats[0].get("partition_count")
        num_ranks = max(num_expected) if isinstance(num_expected, list) else num_expected
        if isinstance(num_ranks, int) and num_ranks != len(flats):
            raise UserError(
                f"{self.path}: {num_ranks} ranks wrote this checkpoint, but {len(flats)} files "
                "*_optim_states.pt are here."
            )
        sliced = "fp32_flat_groups" in flats[0]
        masters, states = "single_partition_of_fp32_groups", "base_optimizer_state"
        if sliced:
            masters, states = "fp32_flat_groups", "optimizer_state_dict"
        self._masters = [_as_list(flat[masters]) for flat in flats]
        self._read_optimizer([flat.get(states) for flat in flats], model)
        paddings = flats[0].get("param_alignment_paddings")
        for vector, shapes in enumerate(model["param_shapes"]):
            sizes = [rank[vector].numel for rank in self._masters]
            offset = 0
            for index, (name, shape) in enumerate(shapes.items()):
                numel = math.prod(shape)
                if sliced:
                    width = -(-numel // len(flats))
                    # The last slice is padded; where there are more ranks than values, others hold padding alone.
                    held = (min(numel - rank * width, width) for rank in range(len(flats)))
                    segments = [_Segment(rank, offset, n) for rank, n in enumerate(held) if n > 0]
                    offset += width
                else:
                    segments = list(_cut(sizes, offset, numel))
                    offset += numel + (paddings[vector][index] if paddings else 0)
                self._places[name] = _Place(tuple(shape), vector, tuple(segments))
            # End to end, the whole is padded to a multiple of twice the number of ranks.
            available, slack = (sizes, 1) if sliced else ([sum(sizes)], 2 * len(flats))
            for num_values in available:
                if not 0 <= num_values - offset < slack:
                    self._refuse_layout(offset, num_values)

    def _read_optimizer(self, stored: list[Any], model: ShardContent) -> None:
        """Fill in the optimizer's states of each vector and the members of each parameter group."""
        if not isinstance(stored[0], dict):
            stored = [{"state": {}, "param_groups": []}] * len(stored)
        order = [index for group in stored[0]["param_groups"] for index in group["params"]]
        num_vectors = len(model["param_shapes"])
        order = order or list(range(num_vectors))
        if len(order) != num_vectors or {len(rank) for rank in self._masters} != {num_vectors}:
            self._refuse_layout(num_vectors, len(order), "vectors")
        self._states = [[rank["state"].get(index) or {} for index in order] for rank in stored]
        for masters, states in zip(self._masters, self._states, strict=True):
            for master, state in zip(masters, states, strict=True):
                for kind in MOMENTS:
                    # Stages 1 and 2 store moments with their padding, and the masters without.
                    if kind in state and state[kind].numel < master.numel:
                        self._refuse_layout(master.numel, state[kind].numel)
        vectors = iter(model["param_shapes"])
        for group in stored[0]["param_groups"]:
            members = [next(vectors) for _ in group["params"]]
            self.groups.append({n: tuple(s) for shapes in members for n, s in shapes.items()})
            self.param_groups.append({k: v for k, v in group.items() if k != "params"})

    def _refuse_layout(self, wanted: int, available: int, unit: str = "values") -> None:
        raise UserError(
            f"{self.path}: parameters need {wanted} {unit} per shard and the shards hold "
            f"{available}: files of different checkpoints are mixed, or DeepSpeed's format changed."
        )


def _cut(sizes: list[int], offset: int, count: int) -> Iterator[_Segment]:
    """Yield the segments of [offset, offset + count) of the ranks' parts laid end to end."""
    begin = 0
    for rank, size in enumerate(sizes):
        low, high = max(offset, begin), min(offset + count, begin + size)
        if low < high:
            yield _Segment(rank, low - begin, high - low)
        begin += size


def _as_list(value: StoredTensor | Iterable[StoredTensor]) -> list[StoredTensor]:
    # A StoredTensor is a tuple itself: one flat vector may stand without a list around it.
    return [value] if isinstance(value, StoredTensor) else list(value)
