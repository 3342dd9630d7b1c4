"""States of a frozen backbone found again by a text's tokens: an index over memory-mapped shards."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pal_ds.heads.jaxtyping_fallback import Float


@dataclass(frozen=True)
class FeatureStore:
    """Hidden states computed once per distinct text: ragged rows of `values`, fp32 or bf16."""

    values: Float[Tensor, "n H"]
    offsets: np.ndarray

    @property
    def width(self) -> int:
        """H."""
        return self.values.shape[1]

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Number of states of the named rows."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def gather(self, rows: np.ndarray, num_positions: int) -> Float[Tensor, "R T H"]:
        lengths = self.lengths_of(rows)
        columns = np.minimum(np.arange(num_positions)[None, :], lengths[:, None] - 1)
        return self.values[torch.from_numpy(self.offsets[rows][:, None] + columns)]


@dataclass(frozen=True)
class MappedFeatures:
    """Stored states as `FeatureStore` gives them, read from memory-mapped shards row by row.

    `shard`, `begin` and `lengths` (int64 [N]) say for each row of a table of texts where its states lie; -1 and 0 for
    rows that were not asked for.
    """

    values: list[Float[Tensor, "n H"]]
    shard: np.ndarray
    begin: np.ndarray
    lengths: np.ndarray

    @property
    def width(self) -> int:
        """H."""
        return self.values[0].shape[1]

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Number of states of the named rows."""
        return self.lengths[rows]

    def gather(self, rows: np.ndarray, num_positions: int) -> Float[Tensor, "R T H"]:
        """States of the named rows; positions past a row's end repeat its last."""
        columns = np.minimum(np.arange(num_positions)[None, :], self.lengths[rows][:, None] - 1)
        index = torch.from_numpy(self.begin[rows][:, None] + columns)
        shards = self.shard[rows]
        present = np.unique(shards)
        assert present[0] >= 0, "a text without states is asked for"
        if len(present) == 1:
            return self.values[present[0]][index]
        first = self.values[present[0]]
        gathered = torch.empty((*index.shape, first.shape[1]), dtype=first.dtype)
        for shard in present:
            chosen = torch.from_numpy(np.flatnonzero(shards == shard))
            gathered[chosen] = self.values[shard][index[chosen]]
        return gathered
