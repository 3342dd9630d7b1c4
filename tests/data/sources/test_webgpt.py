"""WebGPT: the higher score is preferred; ties and empty texts are counted, on 20 rows."""

from datasets import Value

from pal_ds.data.sources import WebGpt
from tests.data.sources.choices import preferred

TEXT = Value("string")
FEATURES = {
    "question": {"dataset": TEXT, "id": TEXT, "full_text": TEXT},
    **{
        key: feature
        for i in (0, 1)
        for key, feature in {
            f"quotes_{i}": {"title": [TEXT], "extract": [TEXT]},
            f"answer_{i}": TEXT,
            f"tokens_{i}": {"prefix": [Value("int32")], "completion": [Value("int32")]},
            f"score_{i}": Value("float32"),
        }.items()
    },
}


def row(question, score, answers=("first [1]", "second")):
    fields = {"question": {"dataset": "eli5", "id": "ab", "full_text": question}}
    for i, (answer, number) in enumerate(zip(answers, (score, -score), strict=True)):
        fields[f"quotes_{i}"] = {"title": ["page"], "extract": ["words"]}
        fields[f"tokens_{i}"] = {"prefix": [1, 2], "completion": [3]}
        fields |= {f"answer_{i}": answer, f"score_{i}": number}
    return fields


def test_exact_counts_and_labels(write_parquet):
    rows = [row(f"q{i}", 0.25) for i in range(8)] + [row(f"q{i}", -1.0) for i in range(6)]
    rows += [row("q", 0.0)] * 4 + [row("q", 1.0, ("", "b")), row(" ", 1.0)]
    assert len(rows) == 20
    source = WebGpt(write_parquet(rows, FEATURES))
    records = list(source.records())
    assert [preferred(record) for record in records] == ["first [1]"] * 8 + ["second"] * 6
    assert source.dropped == {"tie": 4, "empty_response": 1, "empty_prompt": 1}
    assert records[0].prompt == "q0" and records[0].user_id == "population"
    assert source.num_records() == 20
