"""PRISM: chosen against each rejected answer as plain text, and whole dialogues in one split, on 20 rows."""

import json
from collections import Counter

import pytest

from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Prism
from pal_ds.errors import UserError


def model(turn, within, content, chosen, score=50):
    return {
        "turn": turn,
        "role": "model",
        "content": content,
        "model_provider": "huggingface_api",
        "model_name": f"model-{within}",
        "score": score,
        "if_chosen": chosen,
        "within_turn_id": within,
    }


def user(turn, content):
    empty = dict.fromkeys(("model_provider", "model_name", "score", "if_chosen", "within_turn_id"))
    return {"turn": turn, "role": "user", "content": content, **empty}


def row(number, who, history, opening="?"):
    return {
        "conversation_id": f"c{number}",
        "user_id": f"user{who}",
        "conversation_type": "unguided",
        "opening_prompt": opening,
        "conversation_turns": max(entry["turn"] for entry in history) + 1,
        "conversation_history": history,
        "performance_attributes": {"values": 70},
        "open_feedback": "fine",
        "generated_datetime": "2023-12-02 10:00:00",
    }


def two_turns(opening):
    return [
        user(0, opening),
        model(0, 0, "first", False),
        model(0, 1, "second", True),
        model(0, 2, "third ['x', 'y']", False),
        model(0, 3, "fourth", False),
        user(1, "go on"),
        model(1, 0, "one", True),
        model(1, 1, "two", False),
    ]


ROWS = [
    *(row(i, i % 5, two_turns(f"opening {i % 13}")) for i in range(15)),
    row(15, 5, [user(0, "same words"), model(0, 0, "x", True), model(0, 1, "x", True)]),
    row(16, 5, [user(0, "nobody chosen"), model(0, 0, "x", False), user(1, "never read")]),
    row(17, 5, [user(0, "one is empty"), model(0, 0, "x", True), model(0, 1, " ", False)]),
    row(18, 5, [user(0, " "), model(0, 0, "x", True), model(0, 1, "y", False)]),
    row(19, 6, two_turns("a person with one dialogue")),
]
DROPPED = {"no_rejected": 1, "no_chosen": 1, "empty_response": 1, "no_user_text": 1}


@pytest.fixture
def path(write_lines):
    assert len(ROWS) == 20
    return write_lines(ROWS, "conversations.jsonl")


def test_exact_counts_and_history(path):
    source = Prism(path)
    records = list(source.records())
    # 16 dialogues of two turns: three rejected answers in the first, one in the second.
    assert len(records) == 16 * 4 and source.dropped == DROPPED
    assert Counter(r.user_id for r in records) == {**{f"user{i}": 12 for i in range(5)}, "user6": 4}
    first, second = records[0], records[3]
    assert first.prompt == [{"role": "user", "content": "opening 0"}]
    assert second.prompt == [
        {"role": "user", "content": "opening 0"},
        {"role": "assistant", "content": "second"},
        {"role": "user", "content": "go on"},
    ]
    assert second.responses == ("one", "two")
    assert list(source.records()) == records


def test_every_answer_is_one_plain_text(path):
    """LoRe rendered the list of rejected answers into one text, which gives the label away."""
    rejected = Counter()
    said = {entry["content"] for item in ROWS for entry in item["conversation_history"]}
    for record in Prism(path).records():
        chosen, other = record.responses
        assert isinstance(chosen, str) and isinstance(other, str) and record.label == -1
        assert {chosen, other} <= said
        rejected[other] += 1
    # The one answer that holds brackets itself is kept as it was written.
    assert rejected == {"first": 16, "third ['x', 'y']": 16, "fourth": 16, "two": 16}


def test_a_dialogue_falls_whole_into_one_split(path, tmp_path):
    source = Prism(path, dev_fraction=0.2, test_fraction=0.3)
    split_of = {}
    for record in source.records():
        opening = record.prompt[0]["content"]
        assert split_of.setdefault(opening, record.split) == record.split
    assert len({*split_of.values()}) == 3
    config = DataConfig(path=str(tmp_path / "D"), source=source, split="field", vocab_size=300)
    counts = prepare(config, quiet=True).info["counts"]
    # c13 and c14 open like c0 and c1: the same prompts, held once.
    assert counts["comparisons"] == 64 and counts["prompts"] == 14 * 2
    assert min(counts["splits"][name] for name in ("train", "dev", "test")) > 0


def test_users_with_few_dialogues_and_messages(path, write_lines):
    source = Prism(path, min_dialogues=2)
    assert len(list(source.records())) == 60
    assert source.dropped == {**DROPPED, "few_dialogues": 1}
    with pytest.raises(UserError, match=r"dev_fraction 0.6 and test_fraction 0.6"):
        Prism(path, dev_fraction=0.6, test_fraction=0.6)
    both = [user(0, "hi"), model(0, 0, "x", True), model(0, 1, "y", True)]
    with pytest.raises(UserError, match=r"row 0 \(c0\), turn 0: two different answers are chosen"):
        list(Prism(write_lines([row(0, 0, both)], "both.jsonl")).records())
    strange = json.loads(json.dumps(two_turns("hi")))
    strange[1]["role"] = "system"
    with pytest.raises(UserError, match="role 'system'; it must be user or model"):
        list(Prism(write_lines([row(0, 0, strange)], "role.jsonl")).records())
