"""Comparisons that users may be asked for: pairs, or lists of responses to one prompt, with or without an answer."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import combinations

from pal_ds.data.parse import parse_record
from pal_ds.data.records import Record
from pal_ds.data.sources import Jsonl
from pal_ds.data.sources.base import Source
from pal_ds.errors import UserError

_ANSWERS = ("y", "tie", "probability", "margin", "scores", "split", "seen", "controversial")
"""Keys that say what somebody answered, or where a record belongs; a question has none."""
MOST = 2**24
"""Number of candidates at most: their numbers ride in a float32 column."""


class Candidates(Source):
    """Questions: lines as `Jsonl` reads them, of which no answer is read.

    A pair (`response_1` and `response_2`, `chosen` and `rejected`, or two `response_features`) is a candidate, and of
    a list (`responses`, or more `response_features`) every two are. A line with a `user_id` is for that user alone,
    others are for everyone.
    """

    def __init__(self, lines: Jsonl) -> None:
        """`lines` holds the candidates."""
        self.of = lines
        self.questions: list[dict[str, object]] = []
        """The candidates of the last `records()`, as lines to be answered; `margin` of a record is its place here."""

    def __str__(self) -> str:
        """The files, as messages name them."""
        path = self.of.path
        return path if isinstance(path, str) else ", ".join(path)

    def records(self) -> Iterator[Record]:
        self.questions = []
        yield from self.each_row(self.of.lines(), self._of_line)

    def describe(self) -> dict:
        return self.of.describe()

    def _of_line(self, where: str, fields: object) -> Iterator[Record]:
        pairs = _pairs(fields, where) if isinstance(fields, Mapping) else [fields]
        for pair in pairs:
            place = len(self.questions)
            if place >= MOST:
                raise UserError(f"{where}: more than {MOST:,} candidates. Give fewer at a time.")
            # Of vectors and of texts in memory alike: any answer, for a record has one.
            record = parse_record({**pair, "y": 1} if isinstance(pair, dict) else pair, where)
            assert isinstance(pair, dict), "a record is an object"
            self.questions.append(pair)
            yield replace(record, margin=float(place))


def _pairs(fields: Mapping[str, object], where: str) -> list[dict[str, object]]:
    """Every two responses of a line, with all else that belongs to the question."""
    rest = {key: value for key, value in fields.items() if key not in _ANSWERS}
    if "chosen" in rest and "rejected" in rest:
        return [{**_without(rest, "chosen", "rejected"), **_two(rest["chosen"], rest["rejected"])}]
    for key in ("responses", "response_features"):
        responses = rest.get(key)
        if isinstance(responses, list):
            if len(responses) < 2:
                raise UserError(f"{where}: '{key}' must be a list of two or more responses.")
            others = _without(rest, key)
            two = combinations(responses, 2)
            if key == "responses":
                return [{**others, **_two(first, second)} for first, second in two]
            return [{**others, key: [first, second]} for first, second in two]
    return [rest]


def _two(first: object, second: object) -> dict[str, object]:
    return {"response_1": first, "response_2": second}


def _without(fields: Mapping[str, object], *keys: str) -> dict[str, object]:
    return {key: value for key, value in fields.items() if key not in keys}
