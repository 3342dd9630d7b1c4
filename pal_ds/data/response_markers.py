"""Tokens that mark the start of a response, and rows that do not keep to them.

A marker is worth having only if it says where the prompt ends for every row: `find_prompt_length`
of the exported model must find the very boundary that the tables hold.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

MIN_KEPT = 0.999


def common_marker(variants: Sequence[tuple[int, ...]], counts: Sequence[int]) -> list[int] | None:
    """The longest run of last tokens that 99.9% of rows share, else the most frequent last token.

    Only the end is compared: some tokenizers merge the start of a separator with the prompt's last
    character ("?" + newline). None where no row has a marker token at all.
    """
    total = sum(counts)
    for width in range(max(map(len, variants), default=0), 0, -1):
        shared: Counter[tuple[int, ...]] = Counter()
        for variant, count in zip(variants, counts, strict=True):
            if len(variant) >= width:
                shared[variant[-width:]] += count
        marker, count = max(shared.items(), key=lambda item: (item[1], item[0]))
        if count >= MIN_KEPT * total or width == 1:
            return list(marker)
    return None


def run_starts(tokens: np.ndarray, marker: Sequence[int]) -> np.ndarray:
    """Bool per position of a flat array: does the marker start here?"""
    hits = np.ones(len(tokens), bool)
    for shift, token in enumerate(marker):
        # Where the marker would end behind the last token it does not start.
        hits &= np.append(tokens[shift:] == token, np.zeros(shift, bool))[: len(tokens)]
    return hits


def count_in_rows(
    tokens: np.ndarray, offsets: np.ndarray, marker: Sequence[int], skip_end: bool = False
) -> np.ndarray:
    """Count how often the marker lies wholly inside each row; `skip_end` ignores one at the very end."""
    hits = np.concatenate([[0], np.cumsum(run_starts(tokens, marker))])
    last_start = np.maximum(offsets[1:] - len(marker) + 1 - skip_end, offsets[:-1])
    return hits[last_start] - hits[offsets[:-1]]


def count_across(
    left: tuple[np.ndarray, np.ndarray],
    right: tuple[np.ndarray, np.ndarray],
    left_row: np.ndarray,
    marker: Sequence[int],
) -> np.ndarray:
    """Count how often the marker straddles the border of each right row and the left row it follows."""
    reach = len(marker) - 1
    if not reach:
        return np.zeros(len(left_row), np.int64)
    tails = _edge(*left, reach, from_end=True)[left_row]
    window = np.concatenate([tails, _edge(*right, reach, from_end=False)], axis=1)
    count = np.zeros(len(left_row), np.int64)
    for start in range(reach):
        count += (window[:, start : start + reach + 1] == np.asarray(marker)).all(axis=1)
    return count


def _edge(tokens: np.ndarray, offsets: np.ndarray, reach: int, from_end: bool) -> np.ndarray:
    """[rows, reach] first or last tokens of each row; -1 where the row is shorter."""
    if not len(tokens):
        return np.full((len(offsets) - 1, reach), -1)
    start = offsets[1:] - reach if from_end else offsets[:-1]
    columns = start[:, None] + np.arange(reach)
    valid = (columns >= offsets[:-1, None]) & (columns < offsets[1:, None])
    return np.where(valid, tokens[np.clip(columns, 0, len(tokens) - 1)], -1)
