"""DSP's other format: `{"text": [..], "score": [..]}`, two or more scored texts an entry."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import final

from pal_ds.data.parse import check_name
from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source, check_files, describe_files, json_list_or_errors
from pal_ds.errors import UserError
from pal_ds.users.ids import POPULATION_USER


@final
@dataclass(eq=False)
class TextScore(Source):
    """Every pair of an entry's texts with different scores; the higher score is preferred.

    A text holds prompt and response. It is cut at the last `response_marker`: what precedes it,
    without blank space around it, is the prompt, what follows is the response (HH-like text:
    "\\n\\nHuman: ...\\n\\nAssistant: ..."). Dropped and counted: `tie` (pairs of equal score),
    `no_response_marker` and `prompt_differs` (pairs whose texts do not allow that cut),
    `empty_response` (published files hold a few).

    Args:
        path: a JSON list, or JSON Lines.
        response_marker: null takes whole texts as responses without a prompt.
        user_id: whose scores these are, where an entry has no `user_id` of its own.
        licence: recorded in dataset.json.
    """

    path: str
    response_marker: str | None = "\n\nAssistant:"
    user_id: str = POPULATION_USER
    licence: str | None = None

    def __post_init__(self) -> None:
        if self.response_marker == "":
            raise UserError("response_marker is empty; give text, or null for texts without prompt")

    def records(self) -> Iterator[Record]:
        """Pairs (i, j), i < j, in the order of the file."""
        self.dropped.clear()
        records = self.each_row(json_list_or_errors(check_files(self.path)[0]), self._pairs)
        some = False
        for record in records:
            some = True
            yield record
        if not some and (num_unmarked := self.dropped["no_response_marker"]):
            raise UserError(
                f"{self.path}: none of {num_unmarked} pairs has the response_marker {self.response_marker!r} in both "
                "texts, so nobody knows where their responses start. Give the marker of these texts "
                "(data.source.response_marker), or null to take whole texts as responses"
            )

    def _pairs(self, where: str, item: object) -> Iterator[Record]:
        texts, scores = self._check(where, item)
        user_id = check_name(item, "user_id", where) if isinstance(item, dict) else None
        marker = self.response_marker
        parts = [(None, t) if marker is None else cut_transcript(t, marker) for t in texts]
        for i, j in combinations(range(len(texts)), 2):
            first, second = parts[i], parts[j]
            if scores[i] == scores[j]:
                self.dropped["tie"] += 1
            elif first is None or second is None:
                self.dropped["no_response_marker"] += 1
            elif first[0] != second[0]:
                self.dropped["prompt_differs"] += 1
            elif not first[1].strip() or not second[1].strip():
                self.dropped["empty_response"] += 1
            else:
                yield Record(
                    user_id=user_id or self.user_id,
                    label=-1 if scores[i] > scores[j] else 1,
                    prompt=first[0],
                    responses=(first[1], second[1]),
                )

    def describe(self) -> dict:
        return {"class": "TextScore", "files": describe_files(check_files(self.path))}

    @staticmethod
    def _check(where: str, item: object) -> tuple[list[str], list[float]]:
        texts, scores = (item.get("text"), item.get("score")) if isinstance(item, dict) else (0, 0)
        form = 'an entry is {"text": [two or more texts], "score": [a number for each]}'
        if not isinstance(texts, list) or not isinstance(scores, list):
            raise UserError(f"{where}: 'text' or 'score' is missing or is no list; {form}")
        if len(texts) < 2 or len(texts) != len(scores):
            raise UserError(f"{where}: {len(texts)} texts and {len(scores)} scores; {form}")
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{where}: 'text' holds something that is no text; {form}")
        # A score that is not equal to itself is NaN: it is neither better nor worse than any other.
        if not all(
            isinstance(s, int | float) and not isinstance(s, bool) and s == s for s in scores
        ):
            raise UserError(f"{where}: 'score' holds something that is no number; {form}")
        return texts, scores


def cut_transcript(text: str, marker: str) -> tuple[str, str] | None:
    """(prompt, response) around the last marker, without blank space; None where there is none."""
    prompt, found, response = text.rpartition(marker)
    return (prompt.strip(), response.strip()) if found else None
