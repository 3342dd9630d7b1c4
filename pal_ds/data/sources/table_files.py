"""Rows of CSV, TSV and JSON files with their values as they were written: no type is guessed from them."""

import math
import re
from collections.abc import Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pal_ds.data.sources.base import check_files, json_list_or_errors
from pal_ds.data.sources.csv_rows import CsvRows
from pal_ds.errors import UserError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")


def kind_of(path: str | Path) -> str:
    """How a file's name ends, `.csv` or `.jsonl`, without the ending of a compression."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix.lower()


def is_table_file(path: str | Path) -> bool:
    """Return whether a name is that of a file which `TableFiles` reads."""
    return kind_of(path) in (*_DELIMITERS, ".json", ".jsonl")


class TableFiles:
    """The rows of some files, one after the other; may be read again.

    A cell of CSV or TSV is text, or None where it is empty; of columns of one name the rows hold none. JSON keeps the
    types it has.
    """

    def __init__(self, paths: list[str], *, have_tabs: bool = False) -> None:
        """`have_tabs`: columns are separated by tabs, whatever the files' names end in."""
        self.paths, self._have_tabs = check_files(paths), have_tabs

    def _delimiter_of(self, path: Path) -> str | None:
        """The character between the columns of a file; None where it is JSON."""
        return "\t" if self._have_tabs else _DELIMITERS.get(kind_of(path))

    def rows(self) -> Iterator[tuple[str, Any]]:
        """(place, row as a dict) of each row; a UserError in place of one that cannot be read."""
        for path in self.paths:
            delimiter = self._delimiter_of(path)
            is_empty = True
            for row in CsvRows(path, delimiter) if delimiter else json_list_or_errors(path):
                is_empty = False
                yield row
            if is_empty:
                rule = "a header and no row; its first line must name the columns, and each later one is a comparison"
                raise UserError(f"{path}: holds {rule if delimiter else 'no row'}")

    def check_columns(self, needed: Collection[str]) -> None:
        """Raise UserError where a column that is needed has the name of another one."""
        for path in self.paths:
            delimiter = self._delimiter_of(path)
            repeated = CsvRows(path, delimiter).repeated if delimiter else set()
            for name in sorted(repeated.intersection(needed)):
                raise UserError(f"{path}:1: two columns are called {name!r}; rename one of them")

    @property
    def column_names(self) -> list[str]:
        """Columns of all rows, in the order in which they are met."""
        return self._facts[0]

    def __len__(self) -> int:
        return self._facts[1]

    @cached_property
    def _facts(self) -> tuple[list[str], int]:
        names: dict[str, None] = {}
        for path in self.paths:
            if delimiter := self._delimiter_of(path):
                names.update(dict.fromkeys(CsvRows(path, delimiter).names))
        number = 0
        for _, row in self.rows():
            number += 1
            names.update(dict.fromkeys(row) if isinstance(row, dict) else {})
        return [*names], number


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


def as_number(value: object, where: str, column: str) -> object:
    """The number that a cell of text says, whole or finite; what is no text is left as it is.

    Raises:
        UserError: the cell says something else.
    """
    if not isinstance(value, str):
        return value
    # Python would read 1_0 as 10, and the digits of every script.
    number = float(value) if _NUMBER.fullmatch(value.strip()) else math.nan
    if not math.isfinite(number):
        raise UserError(
            f"{where}: '{column}' is {value!r}; it must be a finite number, of digits as in -1.5e3"
        )
    return number


def as_truth(value: object, where: str, column: str) -> object:
    """True or false as a cell of text says it; what is no text is left as it is. Raises UserError for another text."""
    if not isinstance(value, str):
        return value
    truth = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    if truth is None:
        raise UserError(f"{where}: '{column}' is {value!r}; it must be true or false")
    return truth
