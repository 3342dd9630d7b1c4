"""Comparisons of each update: a pure function of (seed, epoch, dataset hash), never of the launch.

How an update is cut into micro-batches over ranks is execution only (`split_update`): it moves no comparison to
another update, so the order of data is the same on one GPU and on a thousand.
"""

import bisect
import hashlib
import itertools
from dataclasses import dataclass, field

import numpy as np


def keyed_generator(*key: object) -> np.random.Generator:
    """A counter-based generator keyed by the given values; the same key gives the same stream on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


@dataclass
class UpdatePlan:
    """Cuts each epoch's permutation of `comparisons` into updates of `batch_pairs`; a short last one is kept.

    With `shuffle_unit: item` whole items (all annotations of one prompt) are permuted and stay adjacent, so that
    an update encodes each text once for all its annotators; an item may straddle one update boundary.
    """

    comparisons: np.ndarray
    """Row numbers of the comparisons to train on, int64 [n]."""
    items: np.ndarray
    """Item (prompt row) of each of them, int64 [n]."""
    batch_pairs: int
    seed: int
    dataset_hash: str
    shuffle_unit: str = "comparison"
    _epoch: int = field(default=-1, init=False)
    _order: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), init=False)

    @property
    def updates_per_epoch(self) -> int:
        return -(-len(self.comparisons) // self.batch_pairs)

    def update(self, epoch: int, index: int) -> np.ndarray:
        """Rows of the comparisons of update `index` of `epoch`, in their global order, int64 [<= batch_pairs]."""
        assert 0 <= index < self.updates_per_epoch, f"update {index} is outside the epoch"
        if epoch != self._epoch:
            self._order, self._epoch = self.comparisons[self._permutation(epoch)], epoch
        return self._order[index * self.batch_pairs : (index + 1) * self.batch_pairs]

    def _permutation(self, epoch: int) -> np.ndarray:
        generator = keyed_generator("order", self.seed, epoch, self.dataset_hash)
        if self.shuffle_unit == "comparison":
            return generator.permutation(len(self.comparisons))
        unique_items, item_of_row = np.unique(self.items, return_inverse=True)
        rank_of_item = generator.permutation(len(unique_items))
        within_item = generator.permutation(len(self.comparisons))
        return np.lexsort((within_item, rank_of_item[item_of_row]))


def split_update(num_pairs: int, world_size: int, micro_batch_pairs: int) -> list[list[np.ndarray]]:
    """Cuts positions 0..num_pairs-1 of an update into [micro-step][rank] runs of at most `micro_batch_pairs`.

    Every rank gets the same number of micro-steps (a missing one would hang the others); sizes differ by at most
    one, and a run may be empty when an update is smaller than the world.
    """
    num_micro_steps = -(-num_pairs // (world_size * micro_batch_pairs))
    runs = np.array_split(np.arange(num_pairs), num_micro_steps * world_size)
    return [runs[step * world_size : (step + 1) * world_size] for step in range(num_micro_steps)]


def split_by_tokens(
    lengths: np.ndarray, world_size: int, micro_batch_pairs: int, micro_batch_tokens: int
) -> list[list[np.ndarray]]:
    """Split an update as `split_update` does, with padded tokens within a budget and shared evenly by ranks.

    A run of n pairs costs n times its longest pair. Runs are consecutive; the fewest micro-steps that the budget
    allows are taken, then the dearest run is made as cheap as these steps allow. A pair dearer than the budget makes
    a run of its own: it cannot be cut.

    Args:
        lengths: tokens of each pair (both responses with their prompts) when padded alone, int64 [n].
    """
    bounds = _cut_greedily(lengths, micro_batch_pairs, micro_batch_tokens)
    num_runs = -(-(len(bounds) - 1) // world_size) * world_size
    budget = bisect.bisect_left(
        range(micro_batch_tokens),
        True,
        lo=1,
        key=lambda tokens: len(_cut_greedily(lengths, micro_batch_pairs, tokens)) - 1 <= num_runs,
    )
    bounds = _cut_greedily(lengths, micro_batch_pairs, budget)
    while len(bounds) - 1 < num_runs:
        sizes = np.diff(bounds)
        widest = int(np.argmax(sizes))
        bounds.insert(widest + 1, bounds[widest] + int(sizes[widest]) // 2)
    runs = [np.arange(begin, end) for begin, end in itertools.pairwise(bounds)]
    return [runs[first : first + world_size] for first in range(0, num_runs, world_size)]


def _cut_greedily(lengths: np.ndarray, most_pairs: int, most_tokens: int) -> list[int]:
    """Bounds of consecutive runs, each as long as pairs and padded tokens allow, at least one pair."""
    bounds, longest = [0], 0
    for position, length in enumerate(lengths.tolist()):
        num_pairs = position + 1 - bounds[-1]
        longest = max(longest, length)
        if num_pairs > 1 and (num_pairs > most_pairs or num_pairs * longest > most_tokens):
            bounds.append(position)
            longest = length
    return [*bounds, len(lengths)]
