"""States of a frozen backbone, read again by a text's row: in memory, or from memory-mapped shards."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pal_ds.heads.jaxtyping_fallback import Float


@dataclass(frozen=True)
class MappedFeatures:
    """Hidden states computed once per distinct text, fp32 or bf16: rows of different length in memory-mapped shards.

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


class FeatureStore(MappedFeatures):
    """Hidden states in memory: those of row i are `values[offsets[i] : offsets[i + 1]]`."""

    def __init__(self, values: Float[Tensor, "n H"], offsets: np.ndarray) -> None:
        begin, lengths = offsets[:-1], np.diff(offsets)
        super().__init__([values], np.zeros(len(lengths), np.int64), begin, lengths)
