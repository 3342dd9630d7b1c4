"""Keepers of encoded states: what both ways of keeping them have in common, and the one in memory."""

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.features import FeatureStore, MappedFeatures
from pal_ds.distributed.world import World


class Keeper:
    """Takes states [n_i, H] row by row; `begin`, `settle`, `flush` and `finish` are called on all ranks in step."""

    def begin(self, rows: np.ndarray, addresses: np.ndarray | None) -> np.ndarray:
        """The rows among `rows` (sorted) whose states it lacks, the same on every rank."""
        raise NotImplementedError

    def take(self, row: int, states: Tensor) -> None:
        """States of a row that this rank has encoded."""
        raise NotImplementedError

    def settle(self) -> None:
        """Called after each forward. Raises on all ranks what went wrong on any."""

    def flush(self) -> None:
        """Make what was taken outlive this process, if it ever will."""

    def finish(self) -> None:
        """All that was lacking has been taken, on some rank."""
        raise NotImplementedError

    def store(self, num_rows: int) -> MappedFeatures | None:
        """The states of the rows of `begin` for a table of `num_rows`; None where there are none."""
        raise NotImplementedError


class MemoryKeeper(Keeper):
    """Keeps the states of all ranks in the memory of each of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rows = np.empty(0, np.int64)
        self._taken: dict[int, Tensor] = {}

    def begin(self, rows: np.ndarray, addresses: np.ndarray | None) -> np.ndarray:
        self._rows = rows
        return rows

    def take(self, row: int, states: Tensor) -> None:
        self._taken[row] = states

    def finish(self) -> None:
        parts = self._world.gather(self._taken)
        self._taken = {row: states for part in parts for row, states in part.items()}

    def store(self, num_rows: int) -> FeatureStore | None:
        if len(self._rows) == 0:
            return None
        states = [self._taken[row] for row in self._rows.tolist()]
        lengths = np.zeros(num_rows, np.int64)
        lengths[self._rows] = [len(state) for state in states]
        return FeatureStore(torch.cat(states), np.concatenate([[0], np.cumsum(lengths)]))
