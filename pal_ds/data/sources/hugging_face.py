"""Anything `datasets.load_dataset` opens: a hub id, or parquet, csv and json files."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, final

from pal_ds.data.parse import KNOWN_KEYS, nearest
from pal_ds.data.parse_lists import LIST_KEYS, records_of_fields
from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source, check_files, describe_files
from pal_ds.data.sources.hub_source import rows_of
from pal_ds.data.sources.open_split import ALIASES, open_split
from pal_ds.data.sources.table_files import TableFiles, as_number, as_truth, is_table_file
from pal_ds.errors import UserError
from pal_ds.io.text_files import parse_json

if TYPE_CHECKING:
    from datasets import Dataset


@final
@dataclass(eq=False)
class HuggingFace(Source):
    """One split of a dataset; chosen and rejected may be message lists that share a prompt.

    Args:
        path: hub id, folder, or one parquet, csv, tsv or json file. Cells of csv and tsv are text, as they were
            written, but for y, margin, probability, tie, seen and controversial; an empty cell is no value. Vectors,
            `responses` and `scores` stand in a cell as JSON.
        split: which split to read.
        name: configuration of a hub dataset.
        columns: our key -> their column, for example {prompt: instruction, chosen: best}. A key
            that is not named here is read from the column of its own name, if there is one; all
            other columns are ignored.
        data_files: files inside `path`, or for the kind `path` (parquet, csv, tsv, json, jsonl): one, several, or
            those of each split. They may be addresses (https://, hf://), which `datasets` reads.
        revision: commit or tag of a hub dataset.
        licence: recorded in dataset.json.
    """

    path: str
    split: str = "train"
    name: str | None = None
    columns: dict[str, str] | None = None
    data_files: str | list[str] | dict[str, str | list[str]] | None = None
    revision: str | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        self.columns = self.columns or {}
        for key in self.columns:
            known = (*KNOWN_KEYS, *LIST_KEYS)
            if key not in known:
                raise UserError(
                    f"columns: unknown key '{key}'{nearest(key, known)}; the keys are "
                    f"{', '.join(known)}, the values are names of the dataset's columns"
                )

    def records(self) -> Iterator[Record]:
        keys = self._keys()
        self.dropped.clear()

        def comparisons(where: str, row: object) -> Iterator[Record]:
            return records_of_fields(_fields(row, keys, where), where, self.dropped)

        yield from self.each_row(self._rows(keys), comparisons)

    def _rows(self, keys: dict[str, str]) -> Iterator[tuple[str, object]]:
        if isinstance(self._dataset, TableFiles):
            yield from self._dataset.rows()
            return
        table = self._dataset.select_columns([*dict.fromkeys(keys.values())])
        for number, row in enumerate(rows_of(table)):
            yield f"{self.path}, split {self.split}, row {number}", row

    def describe(self) -> dict:
        described = {
            "class": "HuggingFace",
            "path": self.path,
            "name": self.name,
            "split": self.split,
            "revision": self.revision,
            "columns": self.columns,
            "rows": len(self._dataset),
        }
        files = self._local_files()
        return {**described, "files": describe_files(files)} if files else described

    def num_records(self) -> int:
        return len(self._dataset)

    def _keys(self) -> dict[str, str]:
        columns, renamed = self._dataset.column_names, self.columns or {}
        for key, column in renamed.items():
            if column not in columns:
                raise UserError(
                    f"{self.path}, split {self.split}: no column '{column}' (columns: {key})"
                    f"{nearest(column, columns)}; it has {', '.join(columns)}"
                )
        keys = {key: key for key in KNOWN_KEYS if key in columns} | renamed
        if not keys.keys() & {"y", "chosen", "rejected", "response_1", "response_2"}:
            # Beside a comparison they are no keys of ours.
            keys |= {key: key for key in LIST_KEYS if key in columns and key not in renamed}
        if isinstance(self._dataset, TableFiles):
            self._dataset.check_columns(keys.values())
        if not keys:
            raise UserError(
                f"{self.path}, split {self.split}: none of its columns ({', '.join(columns)}) is one "
                "of ours; map them with columns, for example {chosen: better, rejected: worse}"
            )
        return keys

    def _local_files(self) -> list[Path]:
        if self.data_files is None:
            return [Path(self.path)] if Path(self.path).is_file() else []
        files = self.data_files
        parts = files.values() if isinstance(files, dict) else [files]
        names = [name for part in parts for name in _names_of(part)]
        return [Path(name) for name in names if Path(name).is_file()]

    @cached_property
    def _dataset(self) -> "TableFiles | Dataset":
        """Files of text are read by us, for `datasets` guesses the types of their values."""
        if self.data_files is None and is_table_file(self.path):
            return TableFiles([self.path])
        files = self.data_files
        names = _names_of(files.get(self.split) if isinstance(files, dict) else files)
        is_here = not any("://" in name for name in names)
        if self.path in ("csv", "json", *ALIASES) and names and is_here:
            given = [str(path) for path in check_files(names)]
            if self.path == "tsv" or all(map(is_table_file, given)):
                return TableFiles(given, have_tabs=self.path == "tsv")
        return open_split(
            self.path,
            self.split,
            name=self.name,
            data_files=self.data_files,
            revision=self.revision,
        )


def _names_of(files: str | list[str] | None) -> list[str]:
    return [files] if isinstance(files, str) else files or []


def _fields(row: object, keys: dict[str, str], where: str) -> object:
    """A row under our keys, the numbers and truths of its texts read as such."""
    if not isinstance(row, Mapping):
        return row
    fields: dict[str, object] = {}
    for key, column in keys.items():
        value = row.get(column)
        if value is None:
            continue
        if key in ("y", "margin", "probability"):
            value = as_number(value, where, column)
        elif key in ("seen", "controversial", "tie"):
            value = as_truth(value, where, column)
        elif key in ("response_features", "prompt_features", *LIST_KEYS) and isinstance(value, str):
            value = parse_json(value, f"{where}: '{column}'")
        elif isinstance(value, datetime | date):
            raise UserError(
                f"{where}: '{column}' was read as a date, {value}; store the column as text"
            )
        fields[key] = value
    return fields
