"""The ranks of a run: what they share, and a clean way out of a process group.

Every decision that ranks must share is taken on rank 0 and broadcast (`World.from_rank_zero`), then acted on by all.
"""

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as torch_dist
from torch import Tensor

from pal_ds.errors import UserError, mendable

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The place of this process among the ranks; `device` is where its tensors live."""

    rank: int
    world_size: int
    device: torch.device
    control: Any = None
    """A gloo group for flags on the host: agreeing on them must not wait for the device."""

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    def from_rank_zero(self, decide: Callable[[], T]) -> T:
        """Return the value of `decide()` on rank 0, on every rank; what fails there fails everywhere."""
        outcome: list[object] = [None, None]
        failure: Exception | None = None
        if self.is_rank_zero:
            try:
                outcome = [decide(), None]
            # Whatever it is (a full disk, say), the others must hear of it instead of waiting.
            except Exception as error:
                shown = mendable(error)
                failure = shown or error
                # Mistakes keep their class; the rest may not survive pickling.
                outcome = [None, shown or RuntimeError(f"rank 0: {failure}")]
        if self.world_size > 1:
            torch_dist.broadcast_object_list(outcome, src=0, device=self.device)
        if failure is not None:
            raise failure
        if isinstance(outcome[1], Exception):
            raise outcome[1]
        return outcome[0]  # type: ignore[return-value]

    def on_every_rank(self, make: Callable[[], T]) -> T:
        """Return each rank's own `make()`; a UserError, or a failed write, on any of them is raised on all."""
        made, problem = None, None
        try:
            made = make()
        except Exception as error:
            shown = mendable(error)
            if shown is None:
                raise
            problem = (type(shown), str(shown))
        problems: list[tuple[type[UserError], str] | None] = [problem] * self.world_size
        if self.world_size > 1:
            torch_dist.all_gather_object(problems, problem)
        for rank, raised in enumerate(problems):
            if raised is not None:
                kind, text = raised
                raise kind(text if rank == 0 else f"rank {rank}: {text}")
        return made  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks in rank order, on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch_dist.all_gather_object(values, value)
        return values

    def any_rank(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on at least one rank; equal on all ranks."""
        if self.world_size == 1:
            return list(flags)
        shared = torch.tensor(flags, dtype=torch.uint8)
        torch_dist.all_reduce(shared, torch_dist.ReduceOp.MAX, group=self.control)
        return [bool(flag) for flag in shared.tolist()]

    def barrier(self) -> None:
        if self.world_size > 1:
            torch_dist.barrier()

    def all_gather(self, tensor: Tensor) -> Tensor:
        """Stack equally shaped tensors of all ranks: [world, ...]."""
        if self.world_size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        torch_dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def sum_integers(self, tensor: Tensor) -> Tensor:
        """Add up over ranks, in place: integers have one sum in any order."""
        if self.world_size > 1:
            torch_dist.all_reduce(tensor)
        return tensor

    def sum(self, tensor: Tensor) -> Tensor:
        """Return the sum over ranks, in rank order: the same bits on every rank and every run."""
        return self.all_gather(tensor).sum(0)


def leave(code: int) -> NoReturn:
    """End a process that had joined a group, without tearing the interpreter down.

    A gloo thread may still be dropping the tensors of a finished collective; if it needs the interpreter lock while
    the interpreter is going, it is forced to exit and aborts the process (rc 134) after all work was done.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
