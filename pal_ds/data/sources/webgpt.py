"""OpenAI's WebGPT comparisons: two answers to a question, scored against each other."""

from collections.abc import Iterator
from typing import final

from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source
from pal_ds.data.sources.hub import PARQUET_EXPORT, HubPath, HubRows, text_of
from pal_ds.errors import UserError
from pal_ds.users.ids import POPULATION_USER


@final
class WebGpt(Source):
    """The answer with the higher score is preferred; scores lie in [-1, 1] and sum to 0.

    One user, `population`; the dataset has one split and does not say who judged. Dropped and
    counted: `tie`, `empty_prompt`, `empty_response`.

    Args:
        path: hub id, folder or file.
    """

    licence = "see openai/webgpt_comparisons"

    def __init__(self, path: HubPath = "openai/webgpt_comparisons") -> None:
        self.path = path
        self._rows = HubRows(
            path,
            ("train",),
            ("question", "answer_0", "answer_1", "score_0", "score_1"),
            data_dir="default",
            revision=PARQUET_EXPORT,
        )

    def records(self) -> Iterator[Record]:
        """In the order of the dataset."""
        self.dropped.clear()
        for where, _, row in self._rows:
            prompt = text_of((row["question"] or {}).get("full_text"), where, "question.full_text")
            first, second = (text_of(row[key], where, key) for key in ("answer_0", "answer_1"))
            scores = row["score_0"], row["score_1"]
            if not all(isinstance(score, int | float) for score in scores):
                raise UserError(f"{where}: the scores are {scores}; both must be numbers")
            if not prompt:
                self.dropped["empty_prompt"] += 1
            elif not first or not second:
                self.dropped["empty_response"] += 1
            elif scores[0] == scores[1]:
                self.dropped["tie"] += 1
            else:
                yield Record(
                    user_id=POPULATION_USER,
                    label=-1 if scores[0] > scores[1] else 1,
                    prompt=prompt,
                    responses=(first, second),
                )

    def describe(self) -> dict:
        """Describe what was read."""
        return {"class": "WebGpt", **self._rows.describe()}

    def num_records(self) -> int:
        """Rows of the dataset."""
        return len(self._rows)
