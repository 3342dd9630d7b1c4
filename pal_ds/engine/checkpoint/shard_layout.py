"""Layout of DeepSpeed's shards: which parameters share a flat vector, and which part of it each rank holds.

Facts of DeepSpeed 0.19. A vector is what the optimizer sees as one parameter:
    stage 3     each parameter is cut into `world_size` equal slices, the last one padded; a rank's slices of one
                parameter group follow one another, in a new vector (a sub-group) once `sub_group_size` values are full
    stages 1, 2 the parameters of a group follow one another; the whole is padded to twice `world_size` and cut evenly
"""

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

from pal_ds.engine.ds_config import DeepSpeedConfig, offloads_optimizer, zero_stage

Shapes = dict[str, tuple[int, ...]]
"""Names and shapes of parameters, in the order in which they are laid down."""


class Piece(NamedTuple):
    """Values [start, start + num_values) of a parameter, at `offset` of a rank's vector."""

    name: str
    start: int
    num_values: int
    offset: int


class VectorGroup(NamedTuple):
    """Parameters that share a vector, and the optimizer's parameter group that steps it."""

    group: int
    shapes: Shapes


@dataclass(frozen=True)
class Layout:
    """All that decides how shards look: a few keys of the DeepSpeed config, and the number of ranks."""

    stage: int
    world_size: int
    bf16: bool
    offloads_optimizer: bool
    """DeepSpeed's CPU Adam counts steps in a plain number, torch's in a tensor."""
    sub_group_size: int
    round_robin: bool
    """Stages 1 and 2: parameters are dealt out to ranks like cards, so their order depends on the world size."""
    aligned: bool
    """Stages 1 and 2: every parameter begins at a multiple of 16 bytes of the weights' dtype."""

    @classmethod
    def of(cls, ds_config: DeepSpeedConfig, world_size: int) -> "Layout":
        """Return the layout under a complete config: the one given to DeepSpeed, or the one stored in its shards."""
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        zero = DeepSpeedZeroConfig(**ds_config["zero_optimization"])
        stage = zero_stage(ds_config)
        return cls(
            stage,
            world_size,
            bf16=bool(ds_config.get("bf16", {}).get("enabled", False)),
            offloads_optimizer=offloads_optimizer(ds_config),
            sub_group_size=int(zero.sub_group_size) if stage == 3 else 0,
            round_robin=stage in (1, 2) and zero.round_robin_gradients,
            aligned=stage in (1, 2) and zero.parameter_alignment,
        )

    def vectors(self, groups: list[Shapes]) -> list[VectorGroup]:
        """Return the vectors of the optimizer's parameter groups, in the order of its states."""
        if self.stage == 3:
            return [
                VectorGroup(index, sub_group)
                for index, group in enumerate(groups)
                for sub_group in self._sub_groups(group)
            ]
        if self.round_robin:
            groups = [dealt(group, self.world_size) for group in groups]
        return [VectorGroup(index, group) for index, group in enumerate(groups)]

    def _sub_groups(self, group: Shapes) -> list[Shapes]:
        widths = {name: self._slice_width(shape) for name, shape in group.items()}
        if self.sub_group_size >= sum(widths.values()):
            return [group]
        groups: list[Shapes] = [{}]
        num_values = 0
        for name, shape in group.items():
            if groups[-1] and num_values >= self.sub_group_size:
                groups.append({})
                num_values = 0
            groups[-1][name] = shape
            num_values += widths[name]
        return groups

    def _slice_width(self, shape: tuple[int, ...]) -> int:
        return -(-math.prod(shape) // self.world_size)

    def paddings(self, shapes: Shapes) -> list[int]:
        """Count the unused values after each parameter of a vector (stages 1 and 2), but not the end padding."""
        unit = (8 if self.bf16 else 4) if self.aligned else 1
        gaps, end = [], 0
        for shape in shapes.values():
            end += math.prod(shape)
            gaps.append(-end % unit)
            end += gaps[-1]
        return [*gaps[:-1], 0] if gaps else []

    def num_values(self, shapes: Shapes) -> int:
        """Return the length of each rank's part of a vector, in values, padding included."""
        if self.stage == 3:
            return sum(self._slice_width(shape) for shape in shapes.values())
        return 2 * -(-self._num_laid(shapes) // (2 * self.world_size))

    def num_padding(self, shapes: Shapes, rank: int) -> int:
        """Count the values at the end of this rank's part that belong to no parameter (stages 1 and 2)."""
        length = self.num_values(shapes)
        return length - min(max(self._num_laid(shapes) - rank * length, 0), length)

    def _num_laid(self, shapes: Shapes) -> int:
        return sum(map(math.prod, shapes.values())) + sum(self.paddings(shapes))

    def pieces(self, shapes: Shapes, rank: int) -> list[Piece]:
        """Return the pieces that make up this rank's part of a vector; values in no piece are padding."""
        return self._slices(shapes, rank) if self.stage == 3 else self._cuts(shapes, rank)

    def _slices(self, shapes: Shapes, rank: int) -> list[Piece]:
        slices, offset = [], 0
        for name, shape in shapes.items():
            width = self._slice_width(shape)
            num_values = min(math.prod(shape) - rank * width, width)
            if num_values > 0:
                slices.append(Piece(name, rank * width, num_values, offset))
            offset += width
        return slices

    def _cuts(self, shapes: Shapes, rank: int) -> list[Piece]:
        length = self.num_values(shapes)
        low, high = rank * length, (rank + 1) * length
        cuts, begin = [], 0
        for (name, shape), padding in zip(shapes.items(), self.paddings(shapes), strict=True):
            end = begin + math.prod(shape)
            first, last = max(low, begin), min(high, end)
            if first < last:
                cuts.append(Piece(name, first - begin, last - first, first - low))
            begin = end + padding
        return cuts


def dealt(shapes: Shapes, world_size: int) -> Shapes:
    """Reorder parameters as `round_robin_gradients` does: every `world_size`-th, then again from the second one on.

    >>> list(dealt({"a": (1,), "b": (2,), "c": (3,), "d": (4,), "e": (5,)}, world_size=2))
    ['a', 'c', 'e', 'b', 'd']
    """
    items = list(shapes.items())
    return dict(itertools.chain(*(items[first::world_size] for first in range(world_size))))


def undealt(shapes: Shapes, world_size: int) -> Shapes:
    """Undo `dealt`.

    >>> shapes = {"a": (1,), "b": (2,), "c": (3,)}
    >>> undealt(dealt(shapes, world_size=2), world_size=2) == shapes
    True
    """
    numbers = dealt({str(number): () for number in range(len(shapes))}, world_size)
    order = sorted(zip(map(int, numbers), shapes.items(), strict=True))
    return dict(item for _, item in order)
