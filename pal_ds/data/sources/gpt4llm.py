"""GPT-4-LLM's comparisons: GPT-4 scored the answers of three models to each instruction."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from pal_ds.data.records import Record
from pal_ds.data.sources.base import (
    Source,
    check_files,
    describe_files,
    json_list_or_errors,
    preferences_by_score,
)
from pal_ds.data.sources.hub_source import text_of
from pal_ds.errors import UserError


@final
@dataclass(eq=False)
class Gpt4Llm(Source):
    """Every pair of answers to an instruction with different scores; the higher is preferred.

    Reads `comparison_data_v2.json` of the repository Instruction-Tuning-with-GPT-4/GPT-4-LLM as it
    is: {"user_input", "responses_and_scores": [{"response", "source", "score"}]}. It is not on the
    hub. DSP's conversion of it ({"text": [..], "score": [..]}) is read by `TextScore`. One user,
    `population`. Dropped and counted: `tie`, `empty_prompt`, `empty_response`.

    Args:
        path: the downloaded file.
    """

    licence = "CC BY-NC 4.0 (Instruction-Tuning-with-GPT-4/GPT-4-LLM)"

    path: str

    def records(self) -> Iterator[Record]:
        """Pairs (i, j), i < j, in the order of the file."""
        self.dropped.clear()
        yield from self.each_row(json_list_or_errors(check_files(self.path)[0]), self._pairs)

    def _pairs(self, where: str, item: object) -> Iterator[Record]:
        prompt, scored = self._check(where, item)
        return preferences_by_score(prompt, scored, self.dropped)

    def describe(self) -> dict:
        return {"class": "Gpt4Llm", "files": describe_files(check_files(self.path))}

    @staticmethod
    def _check(where: str, item: object) -> tuple[str, list[tuple[str, float]]]:
        form = '{"user_input", "responses_and_scores": [{"response", "source", "score"}]}'
        answers = item.get("responses_and_scores") if isinstance(item, dict) else None
        if not isinstance(item, dict) or not isinstance(answers, list):
            raise UserError(f"{where}: 'responses_and_scores' is no list; an entry is {form}")
        scored = []
        for answer in answers:
            score = answer.get("score") if isinstance(answer, dict) else None
            if not isinstance(score, int | float) or score != score:
                raise UserError(f"{where}: a score is {score!r}, no number; an entry is {form}")
            scored.append((text_of(answer.get("response"), where, "response"), float(score)))
        return text_of(item.get("user_input"), where, "user_input"), scored
