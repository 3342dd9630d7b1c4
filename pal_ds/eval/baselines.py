"""Baselines that do not read a response: its length, its first and its last token.

A model no better than this has learned an artefact of how the data were made, or nothing.
"""

from dataclasses import dataclass

import numpy as np

from pal_ds.data.ragged import Ragged
from pal_ds.data.tables import PreparedData, preferences


def length_margins(data: PreparedData, table: np.ndarray) -> np.ndarray | None:
    """Count how many characters longer response_2 is, fp64 [n]; None for vectors, which have no length."""
    if data.response_num_chars is None:
        return None
    chars = data.response_num_chars
    return chars[table["b"]].astype(float) - chars[table["a"]]


@dataclass(frozen=True)
class FormatBaseline:
    """Log-odds that a response that begins, and one that ends, with a token is the preferred one.

    Counted over the training comparisons of all users, with one win and one loss added: s(t) = log((won_t + 1) /
    (lost_t + 1)). A response scores s_first + s_last, as naive Bayes would. Its tokens are known by their ids.
    """

    first: np.ndarray
    last: np.ndarray
    """fp64, by token id."""
    num_end: int
    """Tokens that end every response (end token, template) and so tell none from another."""

    @classmethod
    def of(cls, data: PreparedData) -> "FormatBaseline | None":
        """Counted over the train split; None where responses are vectors or nothing was trained on."""
        rows = data.rows("train")
        rows = rows[preferences(data.comparisons[rows]) != 0]
        if data.responses is None or len(rows) == 0:
            return None
        table = data.comparisons[rows]
        prefers_b = table["label"] > 0
        won = np.where(prefers_b, table["b"], table["a"])
        lost = np.where(prefers_b, table["a"], table["b"])
        num_end = _num_common_end(data.responses, np.unique(np.concatenate([won, lost])))
        wins, losses = _ends(data.responses, won, num_end), _ends(data.responses, lost, num_end)
        num_tokens = max(int(ids.max()) for ids in (*wins, *losses)) + 1
        first, last = (
            np.log(_counts(up, num_tokens) / _counts(down, num_tokens))
            for up, down in zip(wins, losses, strict=True)
        )
        return cls(first, last, num_end)

    def margins(self, data: PreparedData, table: np.ndarray) -> np.ndarray | None:
        """Score of response_2 less that of response_1, fp64 [n]; `data` has the tokenizer of those counted."""
        if data.responses is None:
            return None
        scores = []
        for side in ("a", "b"):
            first, last = _ends(data.responses, table[side], self.num_end)
            scores.append(_known(self.first, first) + _known(self.last, last))
        return scores[1] - scores[0]


def _counts(ids: np.ndarray, num_tokens: int) -> np.ndarray:
    """Count how often each token occurs, plus one."""
    return np.bincount(ids, minlength=num_tokens) + 1.0


def _known(scores: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Score of each token; 0, as of one seen on neither side, for those the counted data do not have."""
    return np.where(ids < len(scores), scores[np.minimum(ids, len(scores) - 1)], 0.0)


def _ends(texts: Ragged, rows: np.ndarray, num_end: int) -> tuple[np.ndarray, np.ndarray]:
    """First token of each text, and the last before its end; the first where there is none."""
    begin, end = texts.offsets[rows], texts.offsets[rows + 1]
    return texts.tokens[begin], texts.tokens[np.maximum(end - 1 - num_end, begin)]


def _num_common_end(texts: Ragged, rows: np.ndarray) -> int:
    """Count the tokens at their end that all of these texts share."""
    ends, shortest = texts.offsets[rows + 1], int(texts.lengths_of(rows).min())
    for count in range(shortest):
        tokens = texts.tokens[ends - 1 - count]
        if (tokens != tokens[0]).any():
            return count
    return shortest
