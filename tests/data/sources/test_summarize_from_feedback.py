"""TL;DR: who is seen, new or neither, who likes what, and every reason to drop, on 20 rows."""

from collections import Counter

import pytest
from datasets import Value

from pal_ds.data.sources import SummarizeFromFeedback
from pal_ds.errors import UserError
from tests.data.sources.choices import preferred

TEXT = Value("string")
FEATURES = {
    "info": dict.fromkeys(("id", "post", "title", "subreddit", "site", "article"), TEXT),
    "summaries": [{"text": TEXT, "policy": TEXT, "note": TEXT}],
    "choice": Value("int32"),
    "worker": TEXT,
    "batch": TEXT,
    "split": TEXT,
    "extra": {"confidence": Value("int32")},
}
LONG, SHORT = " a long summary", " short"


def row(worker, post, summaries=(LONG, SHORT), choice=0, policies=("sup1", "sup2"), split="train"):
    info = {"id": "t3_x", "post": post, "title": "T", "subreddit": "tifu"}
    return {
        "info": {**dict.fromkeys(("site", "article")), **info},
        "summaries": [
            {"text": text, "policy": policy, "note": None}
            for text, policy in zip(summaries, policies, strict=True)
        ],
        "choice": choice,
        "worker": worker,
        "batch": "batch3",
        "split": split,
        "extra": {"confidence": None},
    }


# Usable: ann 4, bob 3, cy 2 and dan 1 in train; dan 3, eve 2 and ann 1 in validation.
TRAIN = [
    *(row("ann", f"post {i}", choice=1) for i in range(4)),
    *(row("bob", f"post {i}", (SHORT, LONG)) for i in range(3)),
    *(row("cy", f"post {i}") for i in range(2)),
    row("dan", "post 0"),
    row("cy", "post 2", policies=("sup1", "sup4_ppo_rm3")),
    row("cy", "post 2", policies=("ref", "sup2")),
    row("cy", None),
    row("cy", "post 3", (" same size", "size same ")),
]
VALIDATION = [
    *(row("dan", f"valid {i}", split="valid1") for i in range(2)),
    row("dan", "post 1", split="valid1"),
    *(row("eve", f"valid {i}", split="valid1") for i in range(2)),
    row("ann", "valid 0", split="valid1"),
]
DROPPED = {
    "policy": 2,
    "no_post": 1,
    "equal_length": 1,
    "other_worker": 2,
    "prompt_in_two_splits": 1,
}


@pytest.fixture
def paths(write_parquet):
    assert len(TRAIN) + len(VALIDATION) == 20
    return {
        "train": write_parquet(TRAIN, FEATURES, "train.parquet"),
        "validation": write_parquet(VALIDATION, FEATURES, "validation.parquet"),
    }


def test_seen_and_new_users_and_exact_counts(paths):
    source = SummarizeFromFeedback(paths, num_workers=3, minority=(1,), unseen_min_comparisons=3)
    records = list(source.records())
    # 10 usable rows in train, 3 in validation once dan's "post 1" and eve are out.
    assert Counter(record.user_id for record in records) == {"ann": 5, "bob": 3, "cy": 2, "dan": 3}
    assert source.dropped == DROPPED
    assert {r.user_id for r in records if r.seen is False} == {"dan"}
    assert all(record.seen for record in records if record.user_id != "dan")
    # Bob, second by answers, is the minority: he likes the shorter summary wherever it stands.
    for record in records:
        longest = max(record.responses, key=len) == preferred(record)
        assert longest == (record.group == "longer")
        assert record.controversial is True
    groups = {record.user_id: record.group for record in records}
    assert (groups["ann"], groups["bob"], groups["cy"]) == ("longer", "shorter", "longer")
    assert list(source.records()) == records and source.dropped == DROPPED
    split = {record.prompt: record.split for record in records}
    assert {split["valid 0"], split["valid 1"]} == {"test"}
    assert {split[f"post {i}"] for i in range(4)} <= {"train", "dev"}
    assert source.describe()["rows"] == {"train": 14, "validation": 6}
    assert source.describe()["unseen"] == ["dan"]


def test_real_choices_all_policies_and_no_new_users(paths):
    source = SummarizeFromFeedback(
        paths,
        preference="choice",
        policies="all",
        num_workers=3,
        minority=(),
        unseen_min_comparisons=None,
    )
    records = list(source.records())
    # Cy gains the two rows of other policies and the one of equal length, so she and ann swap ranks.
    assert Counter(record.user_id for record in records) == {"ann": 5, "bob": 3, "cy": 5}
    assert source.dropped == {"no_post": 1, "other_worker": 6}
    assert {r.label for r in records if r.user_id == "ann" and r.split != "test"} == {1}
    assert {r.label for r in records if r.user_id == "cy"} == {-1}
    assert {record.controversial for record in records} == {None}


def test_a_folder_as_the_hub_lays_it_out(write_parquet, tmp_path):
    write_parquet(TRAIN, FEATURES, "repository/comparisons/train/0000.parquet")
    write_parquet(VALIDATION, FEATURES, "repository/comparisons/validation/0000.parquet")
    source = SummarizeFromFeedback(
        str(tmp_path / "repository"), num_workers=3, minority=(1,), unseen_min_comparisons=3
    )
    assert len(list(source.records())) == 13
    assert len(source.describe()["files"]) == 2


def test_messages(write_parquet, tmp_path):
    with pytest.raises(UserError, match=r"minority \[3, 4, 5\]; the ranks .* num_workers - 1"):
        SummarizeFromFeedback(num_workers=3)
    with pytest.raises(UserError, match=r"no split 'valid' \(did you mean 'validation'"):
        SummarizeFromFeedback({"valid": "x.parquet"})
    with pytest.raises(UserError, match=r"none.parquet: no such file"):
        list(SummarizeFromFeedback({"train": str(tmp_path / "none.parquet")}).records())
    bad = {name: feature for name, feature in FEATURES.items() if name != "worker"}
    rows = [{k: v for k, v in item.items() if k != "worker"} for item in TRAIN]
    with pytest.raises(UserError, match=r"no column 'worker'.*not the published form"):
        list(SummarizeFromFeedback(write_parquet(rows, bad)).records())
    path = write_parquet([row("ann", "post", choice=2)], FEATURES, "choice.parquet")
    with pytest.raises(UserError, match=r"choice.parquet, split train, row 0: 'choice' is 2"):
        list(SummarizeFromFeedback(path).records())
