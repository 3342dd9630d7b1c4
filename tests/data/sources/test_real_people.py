"""UKPConvArg and Polis: their published forms, the protocols that hold something out, and the real files."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from pal_ds.data.prepare import DataConfig, prepare, settings_of
from pal_ds.data.sources import Polis, UkpConvArg
from pal_ds.errors import UserError

TOPIC = "tv-is-better-than-books_tv"
HEADER = "# #id    turkerid    label    a1    a2"
ROWS = [
    'arg1_arg2\tAM3\ta1\tIt is "faster.\tSome cannot read',
    'arg1_arg2\tA39\tequal\tIt is "faster.\tSome cannot read',
    'arg3_arg1\tAM3\ta2\tBooks<br/>are better\tIt is "faster.',
]


def write_topic(folder: Path, rows: list[str], name: str = TOPIC, header: str = HEADER) -> str:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.csv").write_text("\n".join([header, *rows]) + "\n")
    return str(folder)


def test_topic_files(tmp_path: Path) -> None:
    folder = write_topic(tmp_path / "crowd", ROWS)
    write_topic(
        tmp_path / "crowd",
        ROWS[:1],
        "pro-choice-vs-pro-life_pro-life",
        "#id\tturkerid\tlabel\ta1\ta2",
    )
    source = UkpConvArg(path=folder, test_topics=[TOPIC])
    records = [*source.records()]
    assert [(r.user_id, r.label, r.split) for r in records] == [
        ("AM3", -1, "train"),
        ("AM3", -1, "test"),
        ("A39", 0, "test"),
        ("AM3", 1, "test"),
    ]
    assert records[1].prompt == "tv is better than books: tv"
    assert records[3].responses == ("Books\nare better", 'It is "faster.')
    assert [*source.records()] == records
    with pytest.raises(UserError, match=r"no topic 'tv-is-better' \(did you mean") as caught:
        [*UkpConvArg(path=folder, test_topics=["tv-is-better"]).records()]
    assert TOPIC in str(caught.value)
    with pytest.raises(UserError, match="is of test and of dev"):
        UkpConvArg(path=folder, test_topics=[TOPIC], dev_topics=[TOPIC])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("arg1_arg2\tAM3\ta3\tx\ty", "label is 'a3'; it must be one of a1, a2, equal"),
        ("arg1_arg2\tAM3\ta1\tx", "4 cells; a row has id"),
        ("arg1_arg2\t\ta1\tx\ty", "names no worker"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, reason: str) -> None:
    folder = write_topic(tmp_path / "crowd", [*ROWS, row])
    with pytest.raises(UserError, match=reason) as caught:
        source = UkpConvArg(path=folder)
        source.bad_rows.largest_share = 0.0
        [*source.records()]
    assert f"{TOPIC}.csv:5" in str(caught.value)


def test_one_csv_with_its_texts(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("topic,arg1,arg2,worker,label\nt_no,x,y,w1,a2\n")
    (tmp_path / "texts.jsonl").write_text(
        '{"topic": "t_no", "arg": "x", "text": "one"}\n{"topic": "t_no", "arg": "y", "text": "two"}\n'
    )
    files = {"path": str(tmp_path / "labels.csv"), "arguments": str(tmp_path / "texts.jsonl")}
    (record,) = UkpConvArg(**files).records()
    assert (record.label, record.responses, record.prompt) == (1, ("one", "two"), "t: no")
    with pytest.raises(UserError, match="a CSV needs `arguments`"):
        UkpConvArg(path=files["path"])
    (tmp_path / "labels.csv").write_text("topic,arg1,arg2,label\nt_no,x,y,a2\n")
    with pytest.raises(UserError, match=r"labels.csv: has no column 'worker'"):
        [*UkpConvArg(**files).records()]


def test_ukp_as_published(shared_data: Path) -> None:
    files = {
        "path": str(shared_data / "ukp/labels.csv"),
        "arguments": str(shared_data / "ukp/arguments.jsonl"),
    }
    records = [*UkpConvArg(**files).records()]
    assert len(records) == 64_369
    assert Counter(record.label for record in records) == {-1: 25_292, 1: 24_762, 0: 14_315}


def write_conversation(folder: Path, votes: dict[str, str], num_statements: int) -> Path:
    folder.mkdir(parents=True)
    numbers = ",".join(map(str, range(num_statements)))
    rows = [f"{user},0,{cells}" for user, cells in votes.items()]
    header = f"participant,group-id,{numbers}"
    (folder / "participants-votes.csv").write_text("\n".join([header, *rows]) + "\n")
    texts = [f'{n},"Statement, no. {n}"' for n in reversed(range(num_statements))]
    (folder / "comments.csv").write_text("\n".join(["comment-id,comment-body", *texts]) + "\n")
    return folder


def test_votes(tmp_path: Path) -> None:
    folder = write_conversation(tmp_path / "on.tea-time", {"7": "1,-1,0,1,,"}, 6)
    source = Polis(path=str(folder), dev_fraction=0, test_fraction=0)
    records = [*source.records()]
    assert [(r.user_id, r.label, r.responses) for r in records] == [
        ("on.tea-time/7", -1, ("Statement, no. 0", "Statement, no. 1")),
        ("on.tea-time/7", 1, ("Statement, no. 1", "Statement, no. 3")),
    ]
    assert records[0].prompt == "on tea time" and source.dropped == {"pass": 1}
    assert [*Polis(path=str(tmp_path), dev_fraction=0, test_fraction=0).records()] == records
    few = Polis(path=str(folder), dev_fraction=0, test_fraction=0, pairs_per_participant=1)
    assert len([*few.records()]) == 1 and few.dropped["beyond_pairs_per_participant"] == 1


def test_statements_known_by_number(tmp_path: Path) -> None:
    """The same comparisons as by text: a statement is one at its place among those of all conversations."""
    write_conversation(tmp_path / "rain", {"7": "-1,1"}, 2)
    write_conversation(tmp_path / "tea", {"7": "1,-1,0,1,,"}, 6)
    sources = [
        Polis(str(tmp_path), dev_fraction=0, test_fraction=0, known_by=known_by)
        for known_by in ("text", "number")
    ]
    by_text, by_number = ([*source.records()] for source in sources)
    assert len(by_number) == 3
    for text, number in zip(by_text, by_number, strict=True):
        assert (text.user_id, text.label, text.split) == (
            number.user_id,
            number.label,
            number.split,
        )
    vectors = [np.asarray(record.response_features) for record in by_number]
    assert [pair.argmax(1).tolist() for pair in vectors] == [[0, 1], [2, 3], [3, 5]]
    assert all(pair.shape == (2, 8) and pair.sum() == 2 for pair in vectors)
    prompts = {record.prompt_features for record in by_number}
    assert prompts == {(1.0,) * 2 + (0.0,) * 6, (0.0,) * 2 + (1.0,) * 6}
    # Data that were prepared before there was a choice are those by text.
    told = [str(settings_of(DataConfig(path="data", source=source))) for source in sources]
    assert ["'known_by'" in of_source for of_source in told] == [False, True]


@pytest.mark.parametrize("protocol", ["votes", "statements"])
def test_what_is_held_out_is_not_trained_on(tmp_path: Path, protocol: str) -> None:
    draw = np.random.default_rng(0)
    votes = {str(u): ",".join(draw.choice(["1", "-1", "0", ""], size=30)) for u in range(20)}
    folder = write_conversation(tmp_path / "tea", votes, 30)
    source = Polis(path=str(folder), protocol=protocol)  # pyright: ignore[reportArgumentType]
    seen: dict[str, set[tuple[str, object]]] = {"train": set(), "dev": set(), "test": set()}
    for record in source.records():
        whose = record.user_id if protocol == "votes" else ""
        seen[str(record.split)] |= {(whose, response) for response in record.responses or ()}
    assert all(seen.values())
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["dev"]
    data = prepare(
        DataConfig(path=str(tmp_path / "data"), source=source, split="record", vocab_size=300),
        quiet=True,
    )
    counts = data.info["counts"]["splits"]
    assert min(counts["train"], counts["dev"], counts["test"]) > 0
    # Each statement is kept once, however many it is compared with.
    assert len(data.response_prompt) <= 30


def test_a_split_by_record_needs_one(tmp_path: Path) -> None:
    path = write_topic(tmp_path / "crowd", ROWS)
    config = DataConfig(
        path=str(tmp_path / "data"), source=UkpConvArg(path=path), split="record", vocab_size=300
    )
    data = prepare(config, quiet=True)
    assert data.info["counts"]["splits"]["train"] == 3 and data.num_ties == 1


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"protocol": "people"}, "must be votes or statements"),
        ({"test_fraction": 0.95}, "1 together"),
        ({"pairs_per_participant": 0}, "must be 1 or more"),
        ({"known_by": "heart"}, "must be text or number"),
        ({"known_by": "number", "protocol": "statements"}, "Choose known_by: text, or protocol"),
    ],
)
def test_impossible_protocols(tmp_path: Path, keys: dict, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        Polis(path=str(tmp_path), **keys)


def test_some_conversations(tmp_path: Path) -> None:
    for name in ("on.tea", "on.rain"):
        write_conversation(tmp_path / name, {"7": "1,-1"}, 2)
    source = Polis(str(tmp_path), ["on.rain"], dev_fraction=0, test_fraction=0)
    assert {record.user_id for record in source.records()} == {"on.rain/7"}
    with pytest.raises(UserError, match=r"no conversation 'on.rein' \(did you mean 'on.rain'\?\)"):
        [*Polis(str(tmp_path), ["on.rein"]).records()]


def test_a_vote_of_another_kind_is_a_bad_row(tmp_path: Path) -> None:
    folder = write_conversation(tmp_path / "tea", {"7": "1,-1", "8": "1,2"}, 2)
    source = Polis(path=str(folder), dev_fraction=0, test_fraction=0)
    source.bad_rows.largest_share = 0.0
    with pytest.raises(UserError, match=r"votes.csv:3: the vote on statement 1 is '2'"):
        [*source.records()]
    with pytest.raises(
        UserError, match=r"neither .* nor a folder in it holds participants-votes\.csv"
    ):
        [*Polis(path=str(tmp_path / "nothing")).records()]


def test_polis_as_published(shared_data: Path) -> None:
    source = Polis(path=str(shared_data / "polis/brexit-consensus"), pairs_per_participant=10_000)
    records = [*source.records()]
    assert len({record.user_id for record in records}) > 150
    assert source.dropped["pass"] == 666 and source.dropped["no_text"] == 0
