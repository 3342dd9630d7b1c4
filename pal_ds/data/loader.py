"""Builds the batches of each update, in the rank itself or ahead of it in worker processes: the same either way."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from pal_ds.data.batch import Batch
from pal_ds.data.collator import Collator
from pal_ds.data.draws import Draws, keyed_uniform
from pal_ds.data.plan import UpdatePlan, split_by_tokens, split_update
from pal_ds.data.split_packed import padded_lengths, pair_texts, split_by_cost


class UpdateInputs(NamedTuple):
    """Inputs that one rank needs to make one update."""

    rows: np.ndarray
    """Rows of the comparisons table, of the whole update, in global order; one that the generic user is trained on,
    too, stands twice."""
    user_rows: np.ndarray
    """User table row for whom each of them is trained."""
    runs: list[list[np.ndarray]]
    """[micro-step][rank] -> positions in `rows`."""
    batches: list[Batch]
    """This rank's, one per micro-step."""


@dataclass(frozen=True)
class UpdateSource(Dataset[UpdateInputs]):
    """Update number -> its inputs on one rank: a function of plan, split and noise key, with no state of its own."""

    plan: UpdatePlan
    collator: Collator
    rank: int
    world_size: int
    micro_batch_pairs: int
    micro_batch_tokens: int | None = None
    draws: Draws | None = None
    """Random inputs of the head; their update and epoch are filled in."""
    generic_fraction: float = 0.0
    """Probability that a comparison is also trained for the generic user, at `collator.generic_row`."""

    def __getitem__(self, update: int) -> UpdateInputs:
        epoch, index = divmod(update, self.plan.updates_per_epoch)
        rows, user_rows = self._with_generic(epoch, self.plan.update(epoch, index))
        runs = split_rows(
            collator=self.collator,
            rows=rows,
            world_size=self.world_size,
            micro_batch_pairs=self.micro_batch_pairs,
            micro_batch_tokens=self.micro_batch_tokens,
        )
        batches = [self.batch(update, rows, user_rows, step[self.rank]) for step in runs]
        return UpdateInputs(rows, user_rows, runs, batches)

    def batch(
        self, update: int, rows: np.ndarray, user_rows: np.ndarray, positions: np.ndarray
    ) -> Batch:
        epoch = update // self.plan.updates_per_epoch
        draws = None if self.draws is None else replace(self.draws, update=update, epoch=epoch)
        return self.collator(rows[positions], positions, draws, int(rows[0]), user_rows[positions])

    def _with_generic(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of an update with those that are drawn for the generic user twice, side by side; and their users."""
        users = self.collator.user_rows(rows)
        if self.generic_fraction == 0:
            return rows, users
        key = ("generic", self.plan.seed, epoch)
        copies = 1 + (keyed_uniform(key, rows) < self.generic_fraction)
        users = np.repeat(users, copies)
        # The second of two; the first of each stands where the copies before it end.
        users[np.cumsum(copies)[copies == 2] - 1] = self.collator.generic_row
        return np.repeat(rows, copies), users


def split_rows(
    collator: Collator,
    rows: np.ndarray,
    world_size: int,
    micro_batch_pairs: int,
    micro_batch_tokens: int | None,
) -> list[list[np.ndarray]]:
    """[micro-step][rank] positions in `rows` of the comparisons of one forward, within both bounds."""
    bounds = (world_size, micro_batch_pairs)
    if collator.packed and not collator.stored:
        return split_by_cost(pair_texts(collator, rows), *bounds, micro_batch_tokens)
    if micro_batch_tokens is None:
        return split_update(len(rows), *bounds)
    return split_by_tokens(padded_lengths(collator, rows), *bounds, micro_batch_tokens)


def updates_from(
    source: UpdateSource,
    first: int,
    last: int,
    num_workers: int = 0,
    start_worker: Callable[[], None] | None = None,
) -> Iterator[UpdateInputs]:
    """Inputs of the updates first..last-1 in order; `start_worker` runs in each worker process before its first."""
    loader = DataLoader(
        source,
        batch_size=None,
        sampler=range(first, last),
        num_workers=num_workers,
        collate_fn=lambda inputs: inputs,
        worker_init_fn=lambda _: None if start_worker is None else start_worker(),
        # Stored states of a frozen backbone are large: forked workers read their parent's.
        multiprocessing_context="fork" if num_workers else None,
    )
    return iter(loader)
