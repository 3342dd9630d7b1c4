"""Other comparisons that tell of a user: drawn anew for every comparison of a training, fixed for a user elsewhere.

Nothing is stored: a draw is a function of (seed, epoch, row) alone, so it is the same on every rank and after a resume.
"""

from dataclasses import dataclass

import numpy as np

from pal_ds.data.draws import keyed_hashes
from pal_ds.data.tables import PreparedData

TRIES = 4
"""Candidates per wanted comparison of a user who has many: some repeat, or share the prompt."""


@dataclass(frozen=True)
class Contexts:
    """Draws comparisons of a user from those that may be known of the user (the train split)."""

    data: PreparedData
    rows: np.ndarray
    """The comparisons to draw from, by user, int64."""
    first: np.ndarray
    """Place in `rows` of the first of each user of the data, and the end, int64 [U + 1]."""
    seed: int

    @staticmethod
    def of(data: PreparedData, rows: np.ndarray, seed: int) -> "Contexts":
        """Index the comparisons `rows` by user."""
        users = data.comparisons["user"][rows]
        order = np.argsort(users, kind="stable")
        first = np.searchsorted(users[order], np.arange(len(data.users) + 1))
        return Contexts(data, rows[order].astype(np.int64), first, seed)

    def draw(self, rows: np.ndarray, epoch: int, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw for each comparison of `rows` up to `num_pairs` others of its user about other prompts, none twice.

        Returns:
            (comparisons int64 [B, num_pairs], of which the first so many count int64 [B]); what lies behind them
            repeats the comparison itself.
        """
        owners, num_tries = self.data.comparisons["user"][rows], TRIES * num_pairs
        hashes = keyed_hashes(("context", self.seed, epoch), rows, num_tries)
        candidates, there = self._candidates(owners, hashes)
        there &= self._prompts(candidates) != self._prompts(rows)[:, None]
        return _first_of(candidates, there, num_pairs, rows)

    def known(self, users: np.ndarray, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
        """Fix the context of each of these users outside a training: up to `num_pairs`, as `draw` gives them.

        Behind them, and for a user of whom nothing is known, stands row 0.
        """
        hashes = keyed_hashes(("known", self.seed), users, TRIES * num_pairs)
        candidates, there = self._candidates(users, hashes)
        return _first_of(candidates, there, num_pairs, np.zeros(len(users), np.int64))

    def _candidates(self, users: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(comparisons [n, tries] of these users, whether each is there and for the first time).

        Of a user with at most so many all are looked at, in hashed order; of others that many, at hashed places.
        """
        # A user whom the data do not hold has none.
        users, known = np.maximum(users, 0), users >= 0
        count = np.where(known, self.first[users + 1] - self.first[users], 0)[:, None]
        place = np.arange(hashes.shape[1])[None, :]
        few = np.argsort(np.where(place < count, hashes, np.iinfo(np.uint64).max), axis=1)
        many = (hashes % np.maximum(count, 1).astype(np.uint64)).astype(np.int64)
        is_few = count <= hashes.shape[1]
        chosen = np.where(is_few, few, many)
        there = np.where(is_few, place < count, ~_is_repeated(many))
        index = np.minimum(self.first[users][:, None] + chosen, max(len(self.rows) - 1, 0))
        rows = self.rows if len(self.rows) else np.zeros(1, np.int64)
        return rows[index], there

    def _prompts(self, rows: np.ndarray) -> np.ndarray:
        return self.data.response_prompt[self.data.comparisons["a"][rows]]


def _is_repeated(chosen: np.ndarray) -> np.ndarray:
    """Mark entries that stand further left in their row already."""
    order = np.argsort(chosen, axis=1, kind="stable")
    ranked = np.take_along_axis(chosen, order, axis=1)
    again = np.zeros(chosen.shape, bool)
    again[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    repeated = np.empty_like(again)
    np.put_along_axis(repeated, order, again, axis=1)
    return repeated


def _first_of(
    candidates: np.ndarray, there: np.ndarray, num_pairs: int, rest: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The first `num_pairs` candidates of each row that are there, then `rest`; and how many there are."""
    order = np.argsort(~there, axis=1, kind="stable")[:, :num_pairs]
    chosen = np.take_along_axis(candidates, order, axis=1)
    length = np.minimum(there.sum(1), num_pairs).astype(np.int64)
    return np.where(np.arange(num_pairs) < length[:, None], chosen, rest[:, None]), length


def preferred_first(data: PreparedData, rows: np.ndarray) -> np.ndarray:
    """Responses of the comparisons `rows`, the preferred one first, [n, 2]."""
    table = data.comparisons[rows]
    pairs = np.stack([table["a"], table["b"]], axis=1)
    return np.where(table["label"][:, None] < 0, pairs, pairs[:, ::-1])
