"""Builds the batches of each update, in the rank itself or ahead of it in worker processes: the same either way."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader, Dataset

from pal_ds.data.batch import Batch, Collator
from pal_ds.data.costs import padded_lengths, pair_texts
from pal_ds.data.plan import UpdatePlan, split_by_tokens, split_update
from pal_ds.data.split_packed import split_by_cost


class UpdateInputs(NamedTuple):
    """What one rank needs to make one update."""

    rows: np.ndarray
    """Rows of the comparisons table, of the whole update, in global order."""
    user_rows: np.ndarray
    """User table row of each of them."""
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
    noise: tuple[int, int] | None = None
    """(seed, K): asks for Gumbel noise for the users' mixtures."""

    def __getitem__(self, update: int) -> UpdateInputs:
        epoch, index = divmod(update, self.plan.updates_per_epoch)
        rows = self.plan.update(epoch, index)
        runs = self.split(rows)
        batches = [self.batch(update, rows, step_runs[self.rank]) for step_runs in runs]
        return UpdateInputs(rows, self.collator.user_rows(rows), runs, batches)

    def split(self, rows: np.ndarray) -> list[list[np.ndarray]]:
        """[micro-step][rank] positions of an update."""
        bounds = (self.world_size, self.micro_batch_pairs)
        if self.collator.packed and not self.collator.stored:
            texts = pair_texts(self.collator, rows)
            return split_by_cost(texts, *bounds, self.micro_batch_tokens)
        if self.micro_batch_tokens is None:
            return split_update(len(rows), *bounds)
        return split_by_tokens(
            padded_lengths(self.collator, rows), *bounds, self.micro_batch_tokens
        )

    def batch(self, update: int, rows: np.ndarray, positions: np.ndarray) -> Batch:
        """The micro-batch of these positions of an update."""
        noise = None if self.noise is None else (self.noise[0], update, self.noise[1])
        return self.collator(rows[positions], positions, noise, int(rows[0]))


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
        collate_fn=_unchanged,
        worker_init_fn=lambda _: None if start_worker is None else start_worker(),
        # Stored states of a frozen backbone are large: forked workers read their parent's.
        multiprocessing_context="fork" if num_workers else None,
    )
    return iter(loader)


def _unchanged(inputs: Any) -> Any:
    return inputs
