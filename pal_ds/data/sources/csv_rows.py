"""Rows of CSV and TSV; a line that cannot be read costs itself, not the rows after it."""

import csv
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pal_ds.errors import UserError
from pal_ds.io.text_files import as_text, byte_lines

_LONGEST_CELL = 2**31 - 1
_MOST_AT_FAULT = 20
"""Lines whose quotes are looked for one by one; with more of them, nobody could tell cells from rows."""


class _Row(NamedTuple):
    """A row, or why there is none."""

    line: int
    """Number of its first line."""
    cells: list[str]
    """Empty where the line is blank, or cannot be cut into as many as there are columns."""
    error: UserError | None
    lines: list[bytes]


def refuse_other_delimiter(names: Sequence[str], where: Path | str, delimiter: str) -> None:
    """Raise UserError where a header is one name, with what separates columns elsewhere in it."""
    if len(names) != 1:
        return
    others = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
    most = max(others.keys() - {delimiter}, key=names[0].count)
    if most in names[0]:
        raise UserError(
            f"{where}: its columns seem to be separated by {others[most]}, which is not what is read here; save it as "
            ".csv with commas, or as .tsv with tabs"
        )


class CsvRows:
    """The rows of one file, under the names of its first row.

    A quote that is never closed swallows the lines after it. These are then read again: as rows, where each has as many
    cells as there are columns; otherwise each of them counts as a bad row, as they may be lines of one cell.
    """

    def __init__(self, path: Path, delimiter: str) -> None:
        """Raises UserError where the first row cannot be read."""
        csv.field_size_limit(_LONGEST_CELL)
        self.path = path
        self._texts = _Texts(path)
        self._reader = csv.reader(self._texts, delimiter=delimiter, strict=True)
        first = self._next()
        if first is not None and first.error is not None:
            raise first.error
        self.names = first.cells if first is not None else []
        refuse_other_delimiter(self.names, path, delimiter)
        self.repeated = {name for name in self.names if self.names.count(name) > 1}
        """Names of several columns, of which no row tells anything."""

    def __iter__(self) -> Iterator[tuple[str, dict[str, str | None] | UserError]]:
        """Yield (place, {column: cell, None where it is empty}) of each row, a UserError in place of a bad one."""
        while (row := self._next()) is not None:
            is_torn = row.error is not None and not row.cells and len(row.lines) > 1
            for each in self._read_again(row) if is_torn else (row,):
                yield from self._outcome(each)

    def _outcome(self, row: _Row) -> Iterator[tuple[str, dict[str, str | None] | UserError]]:
        where = f"{self.path}:{row.line}"
        if row.error is not None:
            yield where, row.error
        elif row.cells:
            cells = zip(self.names, row.cells, strict=True)
            yield (
                where,
                {name: cell or None for name, cell in cells if name not in self.repeated},
            )

    def _read_again(self, row: _Row) -> list[_Row]:
        """The rows that the lines of a bad one hold, its own first."""
        rows, end, num_at_fault = [], self._texts.number, 0
        while True:
            end = max(end, self._texts.number)
            at_fault = row.error is not None and not row.cells
            num_at_fault += at_fault
            is_part = bool(rows) and sum(line.count(b'"') for line in row.lines) % 2 == 1
            if at_fault and len(row.lines) > 1 and num_at_fault <= _MOST_AT_FAULT:
                # Its first line is at fault, unless those after it are, too.
                self._texts.give_back(row.lines[1:])
            elif at_fault or is_part:
                break
            rows.append(row)
            following = self._next() if self._texts.number < end else None
            if following is None:
                return rows
            row = following
        while self._texts.number < end:
            next(self._texts)
        first, last = rows[0], self._texts.number
        later = range(first.line + 1, last + 1)
        return [first, *(_Row(line, [], self._swallowed(line), []) for line in later)]

    def _swallowed(self, line: int) -> UserError:
        return UserError(
            f"{self.path}:{line}: lies behind a quote of a line before it that is not closed, or is part of a cell; "
            "mend the quotes"
        )

    def _next(self) -> _Row | None:
        """The next row; None at the end of the file."""
        texts = self._texts
        begin, texts.taken, texts.fault = texts.number + 1, [], None
        error: UserError | None = None
        cells: list[str] = []
        try:
            cells = next(self._reader)
        except StopIteration:
            return None
        except csv.Error as fault:
            remedy = "mend the quotes"
            if "new-line" in str(fault):
                remedy = "a line ends in a carriage return alone: save the file with line feeds, or quote such cells"
                fault = csv.Error("a carriage return outside of quotes")
            error = UserError(f"{self.path}:{begin}: not valid CSV ({fault}); {remedy}")
        if cells and begin > 1 and len(cells) != len(self.names):
            error = UserError(
                f"{self.path}:{begin}: {len(cells)} cells under {len(self.names)} columns; quote cells that hold a "
                "delimiter"
            )
        if error is not None:
            return _Row(begin, [], error, texts.taken)
        return _Row(begin, cells, texts.fault, texts.taken)


class _Texts:
    """The lines of a file as text, which may be given back and read again; bytes that are no UTF-8 are kept."""

    def __init__(self, path: Path) -> None:
        self._path, self._lines = path, byte_lines(path)
        self._again: deque[bytes] = deque()
        self.number = 0
        self.taken: list[bytes] = []
        self.fault: UserError | None = None
        """Of the first line since both were cleared that is no UTF-8."""

    def __iter__(self) -> "_Texts":
        return self

    def __next__(self) -> str:
        line = self._again.popleft() if self._again else next(self._lines)
        self.number += 1
        self.taken.append(line)
        try:
            return as_text(line, f"{self._path}:{self.number}")
        except UserError as fault:
            self.fault = self.fault or fault
            return line.decode("utf-8", "surrogateescape")

    def give_back(self, lines: list[bytes]) -> None:
        self._again.extendleft(reversed(lines))
        self.number -= len(lines)
