"""User ids by the ten million: one buffer of text in place of a Python object each, and look-up without a dict."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, SupportsIndex, overload

import numpy as np

from pal_ds.errors import UserError

POPULATION_USER = "population"

_CHUNK = 2**18
"""Ids that are worked on at a time: what a chunk needs beside the text stays in the tens of megabytes."""
_BASE, _SPREAD = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_NAMED_IN_ERRORS = 5


class UserIds(Sequence[str]):
    """An immutable sequence of ids: `text` uint8 holds them in UTF-8, one after the other, `offsets` int64 [U + 1].

    That is Arrow's own layout, so files are read and written without a copy. Ten million ids of 20 characters take
    0.3 GB. Where ids are looked up, an index of 16 bytes per id is made, once.
    """

    def __init__(self, offsets: np.ndarray, text: np.ndarray):
        self.offsets, self.text = offsets, text

    @classmethod
    def of(cls, ids: Iterable[str]) -> "UserIds":
        """Raises UserError for an id that is not text of at least one character, or no valid text."""
        if isinstance(ids, UserIds):
            if (np.diff(ids.offsets) == 0).any():
                raise UserError("user id '' is not a text of at least one character.")
            return ids
        parts: list[bytes] = []
        for user_id in ids:
            if not isinstance(user_id, str) or not user_id:
                raise UserError(f"user id {user_id!r} is not a text of at least one character.")
            try:
                parts.append(user_id.encode())
            except UnicodeEncodeError:
                raise UserError(f"user id {user_id!r} holds half of a surrogate pair.") from None
        offsets = np.zeros(len(parts) + 1, np.int64)
        np.cumsum(np.fromiter(map(len, parts), np.int64, len(parts)), out=offsets[1:])
        return cls(offsets, np.frombuffer(b"".join(parts), np.uint8))

    @classmethod
    def from_arrow(cls, column: Any) -> "UserIds":
        """Read a string column without nulls; the text stays where Arrow has it, on a memory-mapped file too."""
        import pyarrow as pa

        chunks = [chunk.cast(pa.large_string()) for chunk in column.chunks]
        parts = [cls._from_chunk(chunk) for chunk in chunks if len(chunk)]
        return parts[0] if len(parts) == 1 else cls.of(()).joined(*parts)

    @classmethod
    def _from_chunk(cls, chunk: Any) -> "UserIds":
        _, offsets, text = chunk.buffers()
        offsets = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
        text = np.frombuffer(b"" if text is None else text, np.uint8)
        return cls(offsets - offsets[0], text[offsets[0] : offsets[-1]])

    def to_arrow(self) -> Any:
        """A string array; at most 2 GiB of text."""
        import pyarrow as pa

        buffers = pa.py_buffer(self.offsets), pa.py_buffer(self.text)
        return pa.LargeStringArray.from_buffers(len(self), *buffers).cast(pa.string())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), _CHUNK):
            bounds = self.offsets[begin : begin + _CHUNK + 1].tolist()
            text = self.text[bounds[0] : bounds[-1]].tobytes()
            for first, last in itertools.pairwise(bounds):
                yield text[first - bounds[0] : last - bounds[0]].decode()

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "UserIds": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "str | UserIds":
        if isinstance(index, slice):
            first, last, stride = index.indices(len(self))
            if stride != 1:
                return self.take(np.arange(first, last, stride))
            offsets = self.offsets[first : max(first, last) + 1]
            return UserIds(offsets - offsets[0], self.text[offsets[0] : offsets[-1]])
        row = range(len(self))[index]
        return self.text[self.offsets[row] : self.offsets[row + 1]].tobytes().decode()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, UserIds):
            return np.array_equal(self.offsets, other.offsets) and np.array_equal(
                self.text, other.text
            )
        if isinstance(other, Sequence) and not isinstance(other, str):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __contains__(self, user_id: object) -> bool:
        return isinstance(user_id, str) and bool(self.find([user_id])[0] >= 0)

    def take(self, rows: np.ndarray) -> "UserIds":
        """The ids at `rows`, int64, in that order."""
        rows = np.asarray(rows, np.int64)
        if len(rows) == len(self) and np.array_equal(rows, np.arange(len(self))):
            return self
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(self.offsets[rows + 1] - self.offsets[rows], out=offsets[1:])
        text = np.empty(offsets[-1], np.uint8)
        for begin in range(0, len(rows), _CHUNK):
            part = offsets[begin : begin + _CHUNK + 1]
            # Where each byte comes from: the place in the chunk, moved by how far its id moves.
            moved = self.offsets[rows[begin : begin + _CHUNK]] - part[:-1]
            source = np.arange(part[0], part[-1]) + np.repeat(moved, np.diff(part))
            text[part[0] : part[-1]] = self.text[source]
        return UserIds(offsets, text)

    def joined(self, *others: "UserIds") -> "UserIds":
        """These ids and then those of the others."""
        parts = [part for part in (self, *others) if len(part)]
        if len(parts) == 1:
            return parts[0]
        ends = np.cumsum([0, *(len(part.text) for part in parts)])
        offsets = [part.offsets[1:] + end for part, end in zip(parts, ends, strict=False)]
        texts = [part.text for part in parts]
        return UserIds(
            np.concatenate([np.zeros(1, np.int64), *offsets]),
            np.concatenate([np.empty(0, np.uint8), *texts]),
        )

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """Row of each id, int64; -1 where it is none of these."""
        wanted = UserIds.of(ids)
        hashes, order = self._index
        rows = np.full(len(wanted), -1, np.int64)
        if len(self) == 0:
            return rows
        wanted_hashes = wanted._hashes()
        first = np.searchsorted(hashes, wanted_hashes)
        last = np.searchsorted(hashes, wanted_hashes, side="right")
        there = np.flatnonzero(first < last)
        found = order[first[there]]
        same = _equal(self.take(found), wanted.take(there))
        rows[there[same]] = found[same]
        # Who has the hash of another: as good as never, and nothing to be fast at.
        for place in there[~same & (last[there] - first[there] > 1)]:
            rivals = order[first[place] : last[place]]
            rows[place] = next((row for row in rivals if self[row] == wanted[place]), -1)
        return rows

    def missing_from(self, other: "UserIds") -> list[str]:
        """The ids that `other` does not hold, sorted."""
        return sorted(self.take(np.flatnonzero(other.find(self) < 0)))

    def repeated(self) -> list[str]:
        """Ids that occur more than once."""
        hashes, order = self._index
        alike = np.flatnonzero(hashes[1:] == hashes[:-1])
        if not len(alike):
            return []
        seen, twice = set[str](), dict[str, None]()
        for row in np.sort(order[np.union1d(alike, alike + 1)]):
            user_id = self[row]
            if user_id in seen:
                twice[user_id] = None
            seen.add(user_id)
        return list(twice)

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """(hashes ascending, the row of each)."""
        hashes = self._hashes()
        order = np.argsort(hashes, kind="stable")
        return hashes[order], order

    def _hashes(self) -> np.ndarray:
        """64 bits of each id: a polynomial in its bytes, spread over all bits; not safe from who wants ids to meet."""
        hashes = np.empty(len(self), np.uint64)
        for begin in range(0, len(self), _CHUNK):
            offsets = self.offsets[begin : begin + _CHUNK + 1]
            lengths = np.diff(offsets)
            place = np.arange(offsets[-1] - offsets[0])
            place -= np.repeat(offsets[:-1] - offsets[0], lengths)
            powers = np.cumprod(np.full(int(lengths.max()), _BASE, np.uint64), dtype=np.uint64)
            sums = np.zeros(len(place) + 1, np.uint64)
            text = self.text[offsets[0] : offsets[-1]].astype(np.uint64) + np.uint64(1)
            np.cumsum(text * powers[place], out=sums[1:])
            values = sums[offsets[1:] - offsets[0]] - sums[offsets[:-1] - offsets[0]]
            hashes[begin : begin + _CHUNK] = (values ^ (values >> np.uint64(32))) * _SPREAD
        return hashes


def generic_row_of(ids: UserIds) -> int:
    """Row of the user who stands for all of whom nothing is known; -1 where there is none."""
    return int(ids.find([POPULATION_USER])[0])


def named(ids: Sequence[str]) -> str:
    """The first few ids, for a message."""
    shown = ", ".join(repr(user_id) for user_id in ids[:_NAMED_IN_ERRORS])
    more = len(ids) - _NAMED_IN_ERRORS
    return shown if more <= 0 else f"{shown} and {more} more"


def _equal(one: UserIds, other: UserIds) -> np.ndarray:
    """Bool per place: whether both sequences, of one length, hold the same id there."""
    alike = np.diff(one.offsets) == np.diff(other.offsets)
    rows = np.flatnonzero(alike)
    one, other = one.take(rows), other.take(rows)
    differing = np.flatnonzero(one.text != other.text)
    alike[rows[np.searchsorted(one.offsets, differing, side="right") - 1]] = False
    return alike
