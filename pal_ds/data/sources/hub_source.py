"""Published datasets, row by row: split after split, on the hub or in local copies."""

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pal_ds.data.parse import nearest
from pal_ds.data.sources.base import Source, check_files, describe_files
from pal_ds.data.sources.open_split import BUILDERS, builder_of, open_split
from pal_ds.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

BATCH_ROWS = 1000
PARQUET_EXPORT = "refs/convert/parquet"
"""Branch in which the hub keeps every dataset as parquet, also those it publishes as a script."""

HubPath = str | dict[str, str]
"""A hub id, a folder that mirrors the repository, one file (of the first split), or split -> file."""


def rows_of(table: "Dataset") -> Iterator[dict[str, Any]]:
    """Rows in order: `datasets` by itself takes ten times as long to give one after the other."""
    for batch in table.iter(batch_size=BATCH_ROWS):
        columns: dict[str, list] = dict(batch)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


class HubRows:
    """Rows of some splits of one published dataset, in the order of the splits; may be read again.

    Args:
        path: see `HubPath`.
        splits: the dataset's own names of its splits; one file stands for the first.
        columns: the columns to read; all others are left where they are.
        name: configuration, on the hub or in a folder.
        data_dir: folder inside the repository.
        revision: branch, tag or commit on the hub.
        typed: how a column that is no text is read from a copy in CSV, see `as_number` and `as_truth`.
    """

    def __init__(
        self,
        path: HubPath,
        splits: tuple[str, ...],
        columns: tuple[str, ...],
        *,
        name: str | None = None,
        data_dir: str | None = None,
        revision: str | None = None,
        typed: Mapping[str, Callable[[object, str, str], object]] | None = None,
    ) -> None:
        self.path = path
        self.typed = typed or {}
        self.columns = columns
        self.options = {"name": name, "data_dir": data_dir, "revision": revision}
        if isinstance(path, Mapping):
            for split in path:
                if split not in splits:
                    raise UserError(
                        f"path: the dataset has no split '{split}'{nearest(split, splits)}; its "
                        f"splits are {', '.join(splits)}"
                    )
            self.splits = tuple(split for split in splits if split in path)
        else:
            self.splits = splits[:1] if builder_of(path) else splits

    def __iter__(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(place for messages, split, {column: value}) of every row."""
        for split, table in self._tables.items():
            for number, row in enumerate(rows_of(table)):
                where = f"{self._path_of(split)}, split {split}, row {number}"
                yield where, split, self._typed(row, where)

    def with_splits(self) -> Iterator[tuple[str, tuple[str, dict[str, Any]] | UserError]]:
        """(place, (split, row)) of every row as `Source.each_row` takes them, a UserError in place of a bad row."""
        for split, table in self._tables.items():
            for number, row in enumerate(rows_of(table)):
                where = f"{self._path_of(split)}, split {split}, row {number}"
                try:
                    read = split, self._typed(row, where)
                except UserError as error:
                    read = error
                yield where, read

    def _typed(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        return row | {key: read(row[key], where, key) for key, read in self.typed.items()}

    def __len__(self) -> int:
        return sum(map(len, self._tables.values()))

    def describe(self) -> dict:
        """Describe what was opened: rows per split, and content hashes of local files."""
        described = {"path": self.path, **self.options, "rows": self.num_rows}
        files = describe_files(self._local_files())
        return {**described, "files": files} if files else described

    @property
    def num_rows(self) -> dict[str, int]:
        return {split: len(table) for split, table in self._tables.items()}

    def _local_files(self) -> list[Path]:
        paths = [Path(self._path_of(split)) for split in self.splits]
        if not paths[0].is_dir():
            return [path for path in paths if path.is_file()]
        folder = paths[0] / (self.options["data_dir"] or "")
        return sorted(path for path in folder.rglob("*") if builder_of(path.name))

    def _path_of(self, split: str) -> str:
        return self.path if isinstance(self.path, str) else self.path[split]

    @cached_property
    def _tables(self) -> dict[str, Any]:
        return {split: self._open(split) for split in self.splits}

    def _open(self, split: str) -> "Dataset":
        path = self._path_of(split)
        if isinstance(self.path, Mapping):
            check_files(path)
            if builder_of(path) is None:
                raise UserError(f"{path}: ends in none of {', '.join(BUILDERS)}; give such a file")
        options = {} if builder_of(path) else self.options
        if Path(path).exists():
            # A copy has whatever revision was fetched.
            options = {**options, "revision": None}
        table = open_split(path, split, **options)
        names = table.column_names
        for column in self.columns:
            if column not in names:
                raise UserError(
                    f"{path}, split {split}: no column '{column}'{nearest(column, names)}; it has "
                    f"{', '.join(names)}, which is not the published form"
                )
        return table.select_columns([*self.columns])


class HubSource(Source):
    """A source that reads one published dataset."""

    _rows: HubRows

    def describe(self) -> dict:
        return {"class": type(self).__name__, **self._rows.describe()}


class PromptSplits:
    """The split each prompt was first met in: in two, it would carry training data into a test."""

    def __init__(self) -> None:
        self._splits: dict[int, str] = {}

    def admits(self, prompt: str, split: str) -> bool:
        """Return whether the prompt is new or belongs to this split."""
        key = xxhash.xxh3_64_intdigest(prompt.encode("utf-8", "surrogatepass"))
        return self._splits.setdefault(key, split) == split


def text_of(value: object, where: str, key: str) -> str:
    """A text without blank space around it, empty for null; a UserError for anything else."""
    if value is None or isinstance(value, str):
        return (value or "").strip()
    raise UserError(
        f"{where}: '{key}' is {type(value).__name__}; the published rows have text there"
    )


def id_of(value: object, where: str, key: str) -> str:
    """An id as text; a UserError for a number that is not whole, as `datasets` makes of ids where one is missing."""
    if isinstance(value, float) and value.is_integer():
        raise UserError(
            f"{where}: '{key}' is {value!r}: ids were read as numbers with a fraction; make the column text"
        )
    return str(value)
