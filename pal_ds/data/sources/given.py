"""Records that a caller has in memory, in the form of a line of JSON: they are checked as such a line, and counted."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import final

from pal_ds.data.sources.jsonl import Jsonl
from pal_ds.errors import UserError
from pal_ds.io.text_files import parse_json


@final
class GivenRecords(Jsonl):
    """Comparisons of Python objects, which messages count as `record 1`, `record 2`, ...

    Args:
        records: a dict for each, with the keys of a line that `Jsonl` reads.

    Raises:
        UserError: one is no dict, or holds what JSON cannot.
    """

    def __init__(self, records: Iterable[Mapping[str, object]]) -> None:
        super().__init__([])
        self._records = [
            _line(record, f"record {number}") for number, record in enumerate(records, start=1)
        ]
        if not self._records:
            raise UserError("no record is given: the list is empty; give at least one.")

    def __repr__(self) -> str:
        return "records"

    def lines(self) -> Iterator[tuple[str, object]]:
        """Yield (place, value) of each record, a UserError in place of one that no line of JSON may hold."""
        for number, line in enumerate(self._records, start=1):
            where = f"record {number}"
            try:
                yield where, parse_json(line, where)
            except UserError as error:
                yield where, error

    def describe(self) -> dict:
        return {"class": "GivenRecords"}

    def num_records(self) -> int:
        return len(self._records)


def _line(record: object, where: str) -> str:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: is of type {type(record).__name__}; a record is a dict.")
    try:
        return json.dumps(dict(record))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: holds what JSON cannot ({error}); give plain values.") from None
