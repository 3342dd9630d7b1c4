"""Preference records in JSON Lines files: `{"user_id", "prompt", "chosen", "rejected"}` and kin."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pal_ds.data.parse_lists import records_of_fields
from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source, check_files, describe_files, lines_or_errors
from pal_ds.errors import UserError
from pal_ds.io.text_files import byte_lines


@dataclass(eq=False)
class Jsonl(Source):
    """Comparisons in pal_ds's own form, one JSON object a line; texts, chat messages or vectors.

    `{"user_id", "prompt", "chosen", "rejected"}`, or `{"user_id", "prompt", "response_1", "response_2", "y"}` with y -1
    where the first is preferred and 1 where the second is; vectors are `response_features` (two of them) with `y`, and
    `prompt_features`. Optional: `margin`, `group`, `split`, `seen`, `tools`, `controversial`, `probability`.
    A line of `responses` (or more than two `response_features`) and `scores` is a list: every two of different score
    are a comparison, ties are dropped and counted (`tie`).

    Args:
        path: one file or several, read in the order given; `part-*.jsonl` are all that fit, in the order of their
            names. They may be compressed (gzip, zstd, bz2, xz).
        extra_keys: `error` refuses keys that no record has; `ignore` skips them.
        licence: recorded in dataset.json.
    """

    path: str | list[str]
    extra_keys: Literal["error", "ignore"] = "error"
    licence: str | None = None

    def records(self) -> Iterator[Record]:
        vector_sizes: list[int] = []
        self.dropped.clear()

        def comparisons(where: str, fields: object) -> Iterator[Record]:
            for record in records_of_fields(fields, where, self.dropped, self.extra_keys):
                if record.response_features is not None:
                    size = len(record.response_features[0])
                    vector_sizes[:] = vector_sizes or [size]
                    if size != vector_sizes[0]:
                        raise UserError(
                            f"{where}: vectors of size {size}, but the first record's have "
                            f"{vector_sizes[0]}; all vectors of a dataset must have one size"
                        )
                yield record

        yield from self.each_row(self.lines(), comparisons)

    def lines(self) -> Iterator[tuple[str, object]]:
        """Yield (place, value) of each line, a UserError in place of what is no JSON."""
        for path in check_files(self.path):
            num_in_file = 0
            for where_and_fields in lines_or_errors(path):
                num_in_file += 1
                yield where_and_fields
            if not num_in_file:
                raise UserError(f"{path}: holds no record, only blank lines")

    def describe(self) -> dict:
        return {"class": "Jsonl", "files": describe_files(check_files(self.path))}

    def num_records(self) -> int:
        """Number of lines, which is the number of records unless some are blank."""
        lines = (1 for path in check_files(self.path) for _ in byte_lines(path))
        return max(sum(lines), 1)
