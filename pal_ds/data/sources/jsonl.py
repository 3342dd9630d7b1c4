"""Preference records in JSON Lines files: `{"user_id", "prompt", "chosen", "rejected"}` and kin."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

from pal_ds.data.parse import is_list, pairs_of_list, parse_record
from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source, check_files, describe_files, read_lines
from pal_ds.errors import UserError


@final
@dataclass(eq=False)
class Jsonl(Source):
    """Records of design section 5, one JSON object a line; texts, chat messages or vectors.

    A line of `responses` (or more than two `response_features`) and `scores` is a list: every two of different score
    are a comparison, ties are dropped and counted (`tie`).

    Args:
        path: one file or several, read in the order given.
        extra_keys: `error` refuses keys that no record has; `ignore` skips them.
        licence: recorded in dataset.json.
    """

    path: str | list[str]
    extra_keys: Literal["error", "ignore"] = "error"
    licence: str | None = None

    def records(self) -> Iterator[Record]:
        vector_size = None
        self.dropped.clear()
        for path in check_files(self.path):
            num_in_file = 0
            for where, record in self._comparisons(path):
                num_in_file += 1
                if record is None:
                    self.dropped["tie"] += 1
                    continue
                if record.response_features is not None:
                    size = len(record.response_features[0])
                    vector_size = vector_size or size
                    if size != vector_size:
                        raise UserError(
                            f"{where}: vectors of size {size}, but the first record's have "
                            f"{vector_size}; all vectors of a dataset must have one size"
                        )
                yield record
            if not num_in_file:
                raise UserError(f"{path}: holds no record, only blank lines")

    def _comparisons(self, path: Path) -> Iterator[tuple[str, Record | None]]:
        """Yield ("file:line", comparison), several of a list; None in place of a tie."""
        for where, fields in read_lines(path):
            if not isinstance(fields, Mapping) or not is_list(fields):
                yield where, parse_record(fields, where, self.extra_keys)
                continue
            for pair in pairs_of_list(fields, where):
                yield where, None if pair is None else parse_record(pair, where, self.extra_keys)

    def describe(self) -> dict:
        return {"class": "Jsonl", "files": describe_files(check_files(self.path))}

    def num_records(self) -> int:
        """Number of lines, which is the number of records unless some are blank."""
        total = 0
        for path in check_files(self.path):
            with open(path, "rb") as file:
                total += sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        return max(total, 1)
