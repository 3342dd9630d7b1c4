"""OpenAI's WebGPT comparisons: two answers to a question, scored against each other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from pal_ds.data.records import Record
from pal_ds.data.sources.base import preferences_by_score
from pal_ds.data.sources.hub_source import PARQUET_EXPORT, HubPath, HubRows, HubSource, text_of
from pal_ds.errors import UserError


@final
@dataclass(eq=False)
class WebGpt(HubSource):
    """The answer with the higher score is preferred; scores lie in [-1, 1] and sum to 0.

    One user, `population`; the dataset has one split and does not say who judged. Dropped and
    counted: `tie`, `empty_prompt`, `empty_response`.

    Args:
        path: hub id, folder or file.
    """

    licence = "see openai/webgpt_comparisons"

    path: HubPath = "openai/webgpt_comparisons"

    def __post_init__(self) -> None:
        self._rows = HubRows(
            self.path,
            ("train",),
            ("question", "answer_0", "answer_1", "score_0", "score_1"),
            data_dir="default",
            revision=PARQUET_EXPORT,
        )

    def records(self) -> Iterator[Record]:
        self.dropped.clear()
        yield from self.each_row(self._rows.with_splits(), self._pairs)

    def _pairs(self, where: str, split_and_row: tuple[str, dict[str, Any]]) -> Iterator[Record]:
        _, row = split_and_row
        prompt = text_of((row["question"] or {}).get("full_text"), where, "question.full_text")
        answers = [text_of(row[key], where, key) for key in ("answer_0", "answer_1")]
        scores = row["score_0"], row["score_1"]
        if not all(isinstance(score, int | float) for score in scores):
            raise UserError(f"{where}: the scores are {scores}; both must be numbers")
        scored = list(zip(answers, scores, strict=True))
        return preferences_by_score(prompt, scored, self.dropped)

    def num_records(self) -> int:
        return len(self._rows)
