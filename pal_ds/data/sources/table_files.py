"""Rows of CSV, TSV and JSON files with their values as they were written: no type is guessed from them."""

import csv
import math
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from pal_ds.data.sources.base import check_files, json_list_or_errors
from pal_ds.errors import UserError
from pal_ds.io.text_files import as_text, byte_lines

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
_LONGEST_CELL = 2**31 - 1


def kind_of(path: str | Path) -> str:
    """How a file's name ends, `.csv` or `.jsonl`, without the ending of a compression."""
    path = Path(path)
    return (path.with_suffix("") if path.suffix in _COMPRESSED else path).suffix.lower()


def is_table_file(path: str | Path) -> bool:
    """Return whether a name is that of a file which `TableFiles` reads."""
    return kind_of(path) in (*_DELIMITERS, ".json", ".jsonl")


class TableFiles:
    """The rows of some files, one after the other; may be read again.

    A cell of CSV or TSV is text, or None where it is empty. JSON keeps the types it has.
    """

    def __init__(self, paths: list[str]) -> None:
        self.paths = check_files(paths)

    def rows(self) -> Iterator[tuple[str, Any]]:
        """(place, row as a dict) of each row; a UserError in place of one that cannot be read."""
        for path in self.paths:
            yield from (
                _csv_rows(path) if kind_of(path) in _DELIMITERS else json_list_or_errors(path)
            )

    @property
    def column_names(self) -> list[str]:
        """Columns of all rows, in the order in which they are met."""
        return self._facts[0]

    def __len__(self) -> int:
        return self._facts[1]

    @cached_property
    def _facts(self) -> tuple[list[str], int]:
        names: dict[str, None] = {}
        for path in self.paths if kind_of(self.paths[0]) in _DELIMITERS else ():
            names.update(dict.fromkeys(_header(_csv_reader(path), path)))
        number = 0
        for _, row in self.rows():
            number += 1
            names.update(dict.fromkeys(row) if isinstance(row, dict) else {})
        return [*names], number


def _csv_reader(path: Path) -> Iterator[list[str]]:
    csv.field_size_limit(_LONGEST_CELL)
    lines = (as_text(line, f"{path}:{n}") for n, line in enumerate(byte_lines(path), start=1))
    return csv.reader(lines, delimiter=_DELIMITERS[kind_of(path)], strict=True)


def _header(reader: Iterator[list[str]], path: Path) -> list[str]:
    """The names of the columns. Raises UserError where two are alike."""
    names = next(reader, [])
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise UserError(f"{path}:1: two columns are called {repeated[0]!r}; rename one of them")
    return names


def _csv_rows(path: Path) -> Iterator[tuple[str, Any]]:
    reader = _csv_reader(path)
    names = _header(reader, path)
    while True:
        begin = getattr(reader, "line_num", 0) + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that is never closed swallows all that follows: no row can be told after it.
            raise UserError(f"{path}:{begin}: not valid CSV ({error}); mend the quotes") from None
        where = f"{path}:{begin}"
        if not cells:
            continue
        if len(cells) != len(names):
            yield (
                where,
                UserError(
                    f"{where}: {len(cells)} cells under {len(names)} columns; quote cells that hold a delimiter"
                ),
            )
            continue
        yield where, {name: cell or None for name, cell in zip(names, cells, strict=True)}


def as_number(value: object, where: str, column: str) -> object:
    """The number that a cell of text says, whole or finite; what is no text is left as it is.

    Raises:
        UserError: the cell says something else.
    """
    if not isinstance(value, str):
        return value
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: '{column}' is {value!r}; it must be a finite number")
    return number


def as_truth(value: object, where: str, column: str) -> object:
    """True or false as a cell of text says it; what is no text is left as it is. Raises UserError for another text."""
    if not isinstance(value, str):
        return value
    truth = {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    if truth is None:
        raise UserError(f"{where}: '{column}' is {value!r}; it must be true or false")
    return truth
