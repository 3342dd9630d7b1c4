"""Community Alignment: a choice among four as three pairs, with the conversation so far, on rows of its columns."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Value

from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import CommunityAlignment
from pal_ds.errors import UserError
from tests.data.sources.conftest import WriteParquet

TURNS, LETTERS = ("first", "second", "third", "fourth"), "abcd"


def row(number: int, who: str | None, *turns: dict[str, Any], language: str = "en") -> dict:
    """A conversation; turns that did not take place are null in every column."""
    cells: dict[str, Any] = {
        "conversation_id": f"c{number}",
        "annotator_id": who,
        "assigned_lang": language,
        "annotator_age": "18-34",
    }
    for name, turn in zip(TURNS, (*turns, {}, {}, {}), strict=False):
        said = {"prompt": turn.get("prompt"), "preferred_response": turn.get("chosen")}
        said |= {f"response_{letter}": turn.get(letter) for letter in LETTERS}
        cells |= {f"{name}_turn_{key}": value for key, value in said.items()}
    return cells


def turn(prompt: str, chosen: str | None = "response_b", **answers: str | None) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": chosen,
        **dict(zip(LETTERS, "wxyz", strict=True)),
        **answers,
    }


ROWS = [
    *(
        row(i, f"w{i % 5}", turn(f"opening {i % 11}"), turn("go on", "response_d"))
        for i in range(14)
    ),
    row(14, "w0", turn("same", a="x", c="EMPTY STRING", d="x <|end_of_text|>")),
    row(15, "w1", turn("nobody chose", None)),
    row(16, "w2", turn("the chosen one is empty", b=None)),
    row(17, "w3", turn("eins"), language="de"),
    row(18, None, turn("who?")),
    row(19, "w4", turn(" ")),
]
DROPPED = {
    "same_response": 2,
    "empty_response": 1,
    "no_preference": 1,
    "no_preferred_answer": 1,
    "other_language": 1,
    "no_annotator": 1,
    "no_prompt": 1,
}


@pytest.fixture
def path(write_parquet: WriteParquet) -> str:
    return write_parquet(ROWS, dict.fromkeys(ROWS[0], Value("string")))


def test_each_choice_is_three_pairs(path: str) -> None:
    source = CommunityAlignment(path)
    records = [*source.records()]
    assert len(records) == 14 * 2 * 3 and source.dropped == DROPPED
    first, fourth = records[0], records[3]
    assert first.prompt == [{"role": "user", "content": "opening 0"}] and first.label == -1
    assert [record.responses for record in records[:3]] == [("x", "w"), ("x", "y"), ("x", "z")]
    assert fourth.prompt == [
        {"role": "user", "content": "opening 0"},
        {"role": "assistant", "content": "x"},
        {"role": "user", "content": "go on"},
    ]
    assert [record.responses for record in records[3:6]] == [("z", "w"), ("z", "x"), ("z", "y")]
    assert Counter(record.user_id for record in records)["w0"] == 3 * 6
    assert [*source.records()] == records


def test_languages_and_turns(path: str) -> None:
    german = [*CommunityAlignment(path, language="de").records()]
    assert {record.user_id for record in german} == {"w3"} and len(german) == 3
    assert len([*CommunityAlignment(path, language=None, num_turns=1).records()]) == 15 * 3
    with pytest.raises(UserError, match="num_turns is 5; it must be 1 to 4"):
        CommunityAlignment(path, num_turns=5)
    with pytest.raises(UserError, match="their sum at most 1"):
        CommunityAlignment(path, dev_fraction=0.5, test_fraction=0.6)


def test_a_conversation_falls_whole_into_one_split(path: str, tmp_path: Path) -> None:
    source = CommunityAlignment(path, dev_fraction=0.2, test_fraction=0.3)
    split_of: dict[object, object] = {}
    for record in source.records():
        assert record.prompt is not None
        assert split_of.setdefault(str(record.prompt[0]), record.split) == record.split
    assert len({*split_of.values()}) == 3
    config = DataConfig(path=str(tmp_path / "D"), source=source, split="field", vocab_size=300)
    counts = prepare(config, quiet=True).info["counts"]
    # Three openings came twice: the same prompts, held once.
    assert counts["comparisons"] == 84 and counts["prompts"] == 11 * 2


def test_a_choice_that_names_no_answer_is_a_bad_row(write_parquet: WriteParquet) -> None:
    rows = [row(0, "w", turn("hi", "response_e"))]
    source = CommunityAlignment(write_parquet(rows, dict.fromkeys(rows[0], Value("string"))))
    source.bad_rows.largest_share = 0.0
    with pytest.raises(UserError, match=r"\(c0\): first_turn_preferred_response is 'response_e'"):
        [*source.records()]
