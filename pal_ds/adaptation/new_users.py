"""New users that `adapt` fits: their comparisons, and who is fitted together."""

from dataclasses import dataclass

import numpy as np

from pal_ds.data.plan import keyed_generator
from pal_ds.data.tables import PreparedData
from pal_ds.inference.load_run import OpenRun

PAIRS_PER_SHARD = 2**14
"""Number of pairs that are lost at most when a fit is cut off."""
POSITIONS_PER_SHARD = 2**18
"""Hidden states of a backbone that are in memory at once: 4 GB at 4,096 numbers each."""


def few_per_user(data: PreparedData, rows: np.ndarray, num_pairs: int, seed: int) -> np.ndarray:
    """At most `num_pairs` of the comparisons `rows` per user, drawn by (seed, user id): other users do not matter."""
    if len(rows) == 0:
        return rows
    users = data.comparisons["user"][rows]
    by_user = np.argsort(users, kind="stable")
    owners, first = np.unique(users[by_user], return_index=True)
    kept = [
        keyed_generator("few", seed, data.users[owner]).permutation(own)[:num_pairs]
        for owner, own in zip(owners, np.split(rows[by_user], first[1:]), strict=True)
    ]
    return np.sort(np.concatenate(kept))


@dataclass(frozen=True)
class NewUsers:
    """Users to fit, their comparisons, and the shards in which they are fitted together."""

    ids: list[str]
    table_rows: np.ndarray
    """Place in `ids` of each user of the data, -1 for those without comparisons here."""
    rows: np.ndarray
    """Comparisons, by user."""
    first: np.ndarray
    """Place in `rows` of each user's first comparison, and the end; int64 [U + 1]."""
    spans: list[tuple[int, int]]
    """Users of each shard."""

    @staticmethod
    def of(data: PreparedData, rows: np.ndarray, positions: np.ndarray) -> "NewUsers":
        """The users of the comparisons `rows`; `positions` are those scored of each response of the data."""
        user = data.comparisons["user"][rows]
        rows = rows[np.argsort(user, kind="stable")]
        owners, first = np.unique(data.comparisons["user"][rows], return_index=True)
        table_rows = np.full(len(data.users), -1, np.int64)
        table_rows[owners] = np.arange(len(owners))
        table = data.comparisons[rows]
        share = (positions[table["a"]] + positions[table["b"]]) / POSITIONS_PER_SHARD
        shares = np.add.reduceat(np.maximum(share, 1 / PAIRS_PER_SHARD), first)
        ids = [data.users[owner] for owner in owners]
        return NewUsers(ids, table_rows, rows, np.append(first, len(rows)), _spans(shares))

    def rows_of(self, span: tuple[int, int]) -> np.ndarray:
        return self.rows[self.first[span[0]] : self.first[span[1]]]


def _spans(shares: np.ndarray) -> list[tuple[int, int]]:
    """Runs of users that fill at most one shard together; a user who fills more has one alone."""
    spans, begin, filled = [], 0, 0.0
    for user, share in enumerate(shares.tolist()):
        if filled + share > 1 and user > begin:
            spans.append((begin, user))
            begin, filled = user, 0.0
        filled += share
    return [*spans, (begin, len(shares))]


def num_positions(restored: OpenRun, data: PreparedData) -> np.ndarray:
    """Scored positions of each response."""
    num_responses = len(data.response_prompt)
    if data.responses is None or restored.parts.collator.scored_positions == "last":
        return np.ones(num_responses, np.int64)
    return data.responses.lengths_of(np.arange(num_responses))
