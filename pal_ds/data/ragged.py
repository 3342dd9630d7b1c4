"""Rows of different length in one flat array, memory-mapped or in memory."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Ragged:
    """A table whose row i is `tokens[offsets[i] : offsets[i + 1]]`.

    >>> texts = Ragged(np.array([5, 6, 7, 8]), np.array([0, 3, 4]))
    >>> texts[0].tolist(), texts.lengths.tolist()
    ([5, 6, 7], [3, 1])
    >>> texts.take(np.array([1, 0])).tokens.tolist()
    [8, 5, 6, 7]
    """

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """Number of tokens of the named rows: a batch must not walk the whole table."""
        return self.offsets[rows + 1] - self.offsets[rows]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.tokens[self.offsets[row] : self.offsets[row + 1]]

    def take(self, rows: np.ndarray) -> "Ragged":
        """The named rows, copied in that order."""
        lengths = self.lengths[rows]
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[rows] - offsets[:-1], lengths)
        return Ragged(self.tokens[index], offsets)


def windows_from_first_difference(
    texts: Ragged, rows: np.ndarray, pairs: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Find the positions that a pair's two texts do not share.

    Args:
        texts: token ids.
        rows: rows of `texts`; int64 [R].
        pairs: two places in `rows` for each pair; int64 [B, 2].

    Returns:
        the first position where the two texts differ, and the end of the longer one; int64 [B] each.

    >>> texts = Ragged(np.array([5, 6, 7, 5, 9]), np.array([0, 3, 5]))
    >>> start, end = windows_from_first_difference(texts, np.array([0, 1]), np.array([[0, 1]]))
    >>> start.tolist(), end.tolist()
    ([1], [3])
    """
    lengths = texts.lengths_of(rows)
    padded = np.full((len(rows), int(lengths.max()) + 1), -1, np.int64)
    for place, row in enumerate(rows):
        padded[place, : lengths[place]] = texts[row]
    first, second = padded[pairs[:, 0]], padded[pairs[:, 1]]
    return np.argmax(first != second, axis=1), lengths[pairs].max(axis=1)
