"""User ids by the ten million: one Arrow column in place of a Python object each, and look-up without a dict."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, SupportsIndex, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pal_ds.errors import UserError

POPULATION_USER = "population"

_CHUNK = 2**18
"""Ids that are made Python objects at a time."""
_NAMED_IN_ERRORS = 5


class UserIds(Sequence[str]):
    """An immutable sequence of ids in a `column` of Arrow's large_string: files are read and written without a copy.

    Ten million ids of 20 characters take 0.3 GB.
    """

    def __init__(self, column: Any):
        self.column = column

    @classmethod
    def of(cls, ids: Iterable[str]) -> "UserIds":
        """Raises UserError for an id that is not text of at least one character, or no valid text."""
        if isinstance(ids, UserIds):
            if 0 in pc.call_function("binary_length", [ids.column]).to_numpy():
                raise UserError("user id '' is not a text of at least one character.")
            return ids
        texts: list[bytes] = []
        for user_id in ids:
            if not isinstance(user_id, str) or not user_id:
                raise UserError(f"user id {user_id!r} is not a text of at least one character.")
            try:
                texts.append(user_id.encode())
            except UnicodeEncodeError:
                raise UserError(f"user id {user_id!r} holds half of a surrogate pair.") from None
        return cls(pa.array(texts, pa.large_string()))

    @classmethod
    def from_arrow(cls, column: pa.ChunkedArray) -> "UserIds":
        """Read a string column without nulls; one chunk's text stays where Arrow has it, on a mapped file too."""
        column = column.cast(pa.large_string())
        return cls(column.chunk(0) if column.num_chunks == 1 else column.combine_chunks())

    def to_arrow(self) -> Any:
        """A string array; at most 2 GiB of text."""
        return self.column.cast(pa.string())

    def __len__(self) -> int:
        return len(self.column)

    def __iter__(self) -> Iterator[str]:
        for begin in range(0, len(self), _CHUNK):
            yield from self.column[begin : begin + _CHUNK].to_pylist()

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "UserIds": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "str | UserIds":
        if isinstance(index, slice):
            return UserIds(self.column[index])
        return self.column[index].as_py()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, UserIds):
            return self.column.equals(other.column)
        if isinstance(other, Sequence) and not isinstance(other, str):
            return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))
        return NotImplemented

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __contains__(self, user_id: object) -> bool:
        return isinstance(user_id, str) and bool(self.find([user_id])[0] >= 0)

    def take(self, rows: np.ndarray) -> "UserIds":
        """The ids at `rows`, int64, in that order."""
        return UserIds(self.column.take(pa.array(np.asarray(rows, np.int64))))

    def joined(self, *others: "UserIds") -> "UserIds":
        return UserIds(pa.concat_arrays([part.column for part in (self, *others)]))

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """Row of each id, int64; -1 where it is none of these."""
        # The ids that are looked for are hashed, which are often few, and the table is read once.
        wanted = UserIds.of(ids).column.dictionary_encode()
        options = pc.SetLookupOptions(value_set=wanted.dictionary)
        place = pc.call_function("index_in", [self.column], options)
        rows = np.full(len(wanted.dictionary), -1, np.int64)
        rows[place.drop_null().to_numpy()] = np.flatnonzero(place.is_valid())
        return rows[wanted.indices.to_numpy()]

    def missing_from(self, other: "UserIds") -> list[str]:
        """The ids that `other` does not hold, sorted."""
        return sorted(self.take(np.flatnonzero(other.find(self) < 0)))

    def repeated(self) -> list[str]:
        """Ids that occur more than once."""
        ids, counts = self.column.value_counts().flatten()
        return ids.filter(pa.array(counts.to_numpy() > 1)).to_pylist()


def generic_row_of(ids: UserIds) -> int:
    """Row of the user who stands for all of whom nothing is known; -1 where there is none."""
    return int(ids.find([POPULATION_USER])[0])


def named(ids: Sequence[str]) -> str:
    """The first few ids, for a message."""
    shown = ", ".join(repr(user_id) for user_id in ids[:_NAMED_IN_ERRORS])
    more = len(ids) - _NAMED_IN_ERRORS
    return shown if more <= 0 else f"{shown} and {more} more"
