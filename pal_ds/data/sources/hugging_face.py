"""Anything `datasets.load_dataset` opens: a hub id, or parquet, csv and json files."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import final

from pal_ds.data.parse import KNOWN_KEYS, nearest, parse_record
from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source, describe_files
from pal_ds.data.sources.hub_source import open_split, rows_of
from pal_ds.errors import UserError


@final
@dataclass(eq=False)
class HuggingFace(Source):
    """One split of a dataset; chosen and rejected may be message lists that share a prompt.

    Args:
        path: hub id, folder, or one parquet, csv or json file.
        split: which split to read.
        name: configuration of a hub dataset.
        columns: our key -> their column, for example {prompt: instruction, chosen: best}. A key
            that is not named here is read from the column of its own name, if there is one; all
            other columns are ignored.
        data_files: files inside `path`, or for the builder `path` (parquet, csv, json).
        revision: commit or tag of a hub dataset.
        licence: recorded in dataset.json.
    """

    path: str
    split: str = "train"
    name: str | None = None
    columns: dict[str, str] | None = None
    data_files: str | list[str] | dict[str, str] | None = None
    revision: str | None = None
    licence: str | None = None

    def __post_init__(self) -> None:
        self.columns = self.columns or {}
        for key in self.columns:
            if key not in KNOWN_KEYS:
                raise UserError(
                    f"columns: unknown key '{key}'{nearest(key, KNOWN_KEYS)}; the keys are "
                    f"{', '.join(KNOWN_KEYS)}, the values are names of the dataset's columns"
                )

    def records(self) -> Iterator[Record]:
        keys = self._keys()
        table = self._dataset.select_columns([*dict.fromkeys(keys.values())])
        for number, row in enumerate(rows_of(table)):
            fields = {key: row[column] for key, column in keys.items() if row[column] is not None}
            yield parse_record(fields, f"{self.path}, split {self.split}, row {number}")

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
        if not keys:
            raise UserError(
                f"{self.path}, split {self.split}: none of its columns ({', '.join(columns)}) is one "
                "of ours; map them with columns, for example {chosen: better, rejected: worse}"
            )
        return keys

    def _local_files(self) -> list[Path]:
        files = self.data_files
        if files is None:
            return [Path(self.path)] if Path(self.path).is_file() else []
        names = [files] if isinstance(files, str) else [*files] if isinstance(files, list) else []
        names = [*files.values()] if isinstance(files, dict) else names
        return [Path(name) for name in names if Path(name).is_file()]

    @cached_property
    def _dataset(self):
        return open_split(
            self.path,
            self.split,
            name=self.name,
            data_files=self.data_files,
            revision=self.revision,
        )
