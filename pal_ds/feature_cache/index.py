"""Index over the memory-mapped shards of the feature cache: which text lies in which."""

import numpy as np

from pal_ds.data.features import MappedFeatures
from pal_ds.feature_cache.shards import Shard


def first_of_each(addresses: np.ndarray) -> np.ndarray:
    """Find where each distinct address (uint64 [n, 2]) first occurs, in ascending order of address; int64."""
    order = np.lexsort((addresses[:, 1], addresses[:, 0]))
    ordered = addresses[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return order[is_new]


class FeatureIndex:
    """An index of which text lies in which shard. A text that two writers have stored counts once."""

    def __init__(self, shards: list[Shard]) -> None:
        self.values = [shard.values for shard in shards]
        nothing = np.empty((0, 2), np.uint64)
        addresses = np.concatenate([nothing, *(shard.addresses for shard in shards)])
        of_shard = np.repeat(np.arange(len(shards)), [len(shard.lengths) for shard in shards])
        begin = [np.cumsum(shard.lengths) - shard.lengths for shard in shards]
        order = first_of_each(addresses)
        self._addresses = addresses[order]
        self._shard = of_shard[order].astype(np.int64)
        self._begin = np.concatenate([np.empty(0, np.int64), *begin])[order]
        lengths = [np.empty(0, np.int64), *(shard.lengths for shard in shards)]
        self._lengths = np.concatenate(lengths)[order]
        counts = np.unique(self._addresses[:, 0], return_counts=True)[1]
        self._longest_run = int(counts.max(initial=1))

    def __len__(self) -> int:
        return len(self._addresses)

    def find(self, addresses: np.ndarray) -> np.ndarray:
        """Entry of each address (uint64 [n, 2]), -1 for those that are not here; int64 [n]."""
        entries = np.full(len(addresses), -1, np.int64)
        place = np.searchsorted(self._addresses[:, 0], addresses[:, 0])
        # Texts whose addresses share their first half lie side by side.
        for step in range(self._longest_run):
            candidate = np.minimum(place + step, len(self) - 1)
            if len(self):
                equal = (self._addresses[candidate] == addresses).all(axis=1)
                entries[equal] = candidate[equal]
        return entries

    def store(self, entries: np.ndarray, rows: np.ndarray, num_rows: int) -> MappedFeatures:
        """A store for a table of `num_rows` texts, of which `rows` lie at `entries`."""
        shard = np.full(num_rows, -1, np.int64)
        begin, lengths = np.zeros(num_rows, np.int64), np.zeros(num_rows, np.int64)
        shard[rows], begin[rows] = self._shard[entries], self._begin[entries]
        lengths[rows] = self._lengths[entries]
        return MappedFeatures(self.values, shard, begin, lengths)
