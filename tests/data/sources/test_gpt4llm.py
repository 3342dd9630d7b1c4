"""GPT-4-LLM: every pair of scored answers, in the form of the published file."""

import json

import pytest

from pal_ds.data.sources import Gpt4Llm
from pal_ds.errors import UserError
from tests.data.sources.choices import preferred

SOURCES = ("gpt4", "text-davinci-003", "icm-1.3b")


def entry(instruction, *scores, responses=("a", "b", "c")):
    answers = zip(responses, SOURCES, scores, strict=True)
    return {
        "user_input": instruction,
        "responses_and_scores": [
            {"response": response, "source": source, "score": score}
            for response, source, score in answers
        ],
    }


def test_exact_counts_and_labels(tmp_path):
    entries = [entry(f"do {i}", 9.0, 7.0, 8.0) for i in range(17)]
    entries += [entry("tie", 9, 9, 1), entry("x", 3, 2, 1, responses=("a", " ", "c"))]
    entries += [entry("", 3, 2, 1)]
    assert len(entries) == 20
    path = tmp_path / "comparison_data_v2.json"
    path.write_text(json.dumps(entries))
    source = Gpt4Llm(str(path))
    records = list(source.records())
    assert [preferred(record) for record in records[:3]] == ["a", "a", "c"]
    # 17 x 3, two of the tied entry, one of the entry with an empty answer.
    assert len(records) == 51 + 2 + 1
    assert source.dropped == {"tie": 1, "empty_response": 2, "empty_prompt": 3}
    path.write_text(json.dumps([{"user_input": "x", "responses_and_scores": [{"response": "a"}]}]))
    with pytest.raises(UserError, match="entry 0: a score is None, no number"):
        list(source.records())
