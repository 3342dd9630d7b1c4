"""Rows of different length in one flat array, memory-mapped or in memory."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Ragged:
    """Row i is `tokens[offsets[i] : offsets[i + 1]]`."""

    tokens: np.ndarray
    offsets: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of every row."""
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
    """(first place where the two texts of a pair differ, end of the longer one); `pairs` [B, 2]: places in `rows`."""
    lengths = texts.lengths_of(rows)
    padded = np.full((len(rows), int(lengths.max()) + 1), -1, np.int64)
    for place, row in enumerate(rows):
        padded[place, : lengths[place]] = texts[row]
    first, second = padded[pairs[:, 0]], padded[pairs[:, 1]]
    return np.argmax(first != second, axis=1), lengths[pairs].max(axis=1)
