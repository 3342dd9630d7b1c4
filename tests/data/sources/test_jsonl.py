"""Both record forms, chat messages, vectors, and every message about a bad line."""

import pytest

from pal_ds.data.sources import Jsonl
from pal_ds.errors import UserError

GOOD = {"user_id": "ann", "prompt": "p", "chosen": "c", "rejected": "r"}
PAIR = {"prompt": "p", "response_1": "a", "response_2": "b", "y": 1}
VECTORS = {"response_features": [[1, 2], [3, 4]], "y": -1}


def read(write_lines, *rows, **options):
    return list(Jsonl(write_lines(list(rows)), **options).records())


def test_both_forms_and_optional_keys(write_lines):
    first, second, third = read(
        write_lines,
        {
            **GOOD,
            "group": "g",
            "margin": 0.5,
            "split": "dev",
            "seen": False,
            "probability": 0.25,
            "controversial": True,
        },
        "",
        PAIR,
        {**GOOD, "user_id": 7},
    )
    assert (first.user_id, first.label, first.responses) == ("ann", -1, ("c", "r"))
    assert (first.group, first.margin, first.split, first.seen) == ("g", 0.5, "dev", False)
    assert first.probability == 0.25 and first.controversial is True
    assert second.controversial is None
    assert (second.user_id, second.label, second.responses) == ("population", 1, ("a", "b"))
    assert third.user_id == "7"


def test_several_files(write_lines):
    paths = [write_lines([GOOD, GOOD], "a.jsonl"), write_lines([PAIR], "b.jsonl")]
    source = Jsonl(paths)
    assert len(list(source.records())) == 3 == source.num_records()
    assert [entry["path"] for entry in source.describe()["files"]] == paths


def test_messages_share_an_implicit_prompt(write_lines):
    turn = [{"role": "user", "content": "hi"}]
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    row = {"chosen": [*turn, good], "rejected": [*turn, bad]}
    explicit = {"prompt": turn, "chosen": [good], "rejected": [bad]}
    both = {"prompt": "hi", **row}
    for record in read(write_lines, row, explicit, both):
        assert record.prompt == turn and record.responses == ([good], [bad])


def test_vectors(write_lines):
    (record,) = read(write_lines, {**VECTORS, "prompt_features": [5, 6]})
    assert record.response_features == ((1.0, 2.0), (3.0, 4.0)) and record.label == -1
    assert record.prompt_features == (5.0, 6.0)


def message(role: str, content: object) -> dict:
    return {"role": role, "content": content}


BAD = [
    ('{"prompt": "p", ', "not valid JSON .* every line must hold one complete JSON object"),
    ("[1]", "expected an object, found list"),
    ({"prompt": "p", "chosen": "c"}, "missing key 'rejected'"),
    (
        {"prompt": "p", "chosen": "c", "rejceted": "r"},
        r"missing key 'rejected' \(did you mean 'rejected' by 'rejceted'\?\)",
    ),
    ({"prompt": "p"}, "missing key 'chosen'"),
    ({**PAIR, "y": None}, "missing key 'y'"),
    ({**PAIR, "chosen": "c"}, "keys of two record forms at once"),
    (
        {**PAIR, "y": 2},
        r"'y' is 2; it must be -1 \(response_1 is preferred\), 1 \(response_2 is preferred\) or 0",
    ),
    ({**PAIR, "y": True}, "'y' is True"),
    ({**PAIR, "y": "1"}, "'y' is '1'"),
    ({**GOOD, "chosen": ""}, "'chosen' is empty; every response needs text"),
    ({**GOOD, "rejected": [message("assistant", " ")]}, "'rejected' is empty"),
    ({**GOOD, "chosen": 5}, "'chosen' is int; it must be text or a list of chat messages"),
    ({**GOOD, "prompt": []}, "'prompt' is an empty list"),
    ({**GOOD, "prompt": [message("user", 3)]}, "'prompt' message 0 is .* a message is an object"),
    ({**GOOD, "chosen": [message("user", "x")]}, "'chosen' holds messages that are not the assis"),
    (
        {
            "chosen": [message("user", "a"), message("assistant", "b")],
            "rejected": [message("user", "c"), message("assistant", "b")],
        },
        "only the assistant's messages may differ",
    ),
    (
        {
            "prompt": "other",
            "chosen": [message("user", "a"), message("assistant", "b")],
            "rejected": [message("user", "a"), message("assistant", "c")],
        },
        "'prompt' differs from the messages that both responses begin with",
    ),
    ({**GOOD, "usr_id": "x"}, r"unknown key 'usr_id' \(did you mean 'user_id'\?\).*extra_keys"),
    ({**GOOD, "user_id": ""}, "'user_id' is ''; give a text that is not blank"),
    (
        {**GOOD, "user_id": " \t"},
        r"'user_id' is ' \\t'; give a text that is not blank .*leave the key",
    ),
    ({**GOOD, "group": " "}, "'group' is ' '; give a text that is not blank, or leave the key out"),
    ({**GOOD, "margin": -1}, "'margin' is -1; it must be a finite number between 0 and 3"),
    ({**GOOD, "margin": 1e39}, "'margin' is 1e.39; it must be a finite number between 0 and"),
    ('{"chosen": "a", "rejected": "b", "margin": NaN}', "'margin' is nan"),
    ({**GOOD, "probability": 1.5}, "'probability' is 1.5; .*between 0 and 1"),
    ({**GOOD, "split": "tset"}, r"'split' is 'tset' \(did you mean 'test'\?\)"),
    ({**GOOD, "seen": "no"}, "'seen' is 'no'; it must be true or false"),
    ({**GOOD, "controversial": 1}, "'controversial' is 1; it must be true or false"),
    ({**GOOD, "group": ""}, "'group' is ''"),
    ({**VECTORS, "prompt": "p"}, "a record holds texts or vectors, never both"),
    ({**VECTORS, "response_features": [[1, 2]]}, "must be a list of two vectors"),
    ({**VECTORS, "response_features": [[1, 2], [3]]}, r"vectors of sizes \[2, 1\] in one record"),
    ({**VECTORS, "response_features": [[1, 2], ["x", 1]]}, "must be a non-empty list of numbers"),
    ('{"response_features": [[1, 2], [3, Infinity]], "y": 1}', "a number that is not finite"),
    ({**VECTORS, "prompt_features": [1]}, r"vectors of sizes \[2, 2, 1\]"),
]


@pytest.mark.parametrize(("row", "text"), BAD)
def test_a_bad_line_is_named(write_lines, row, text):
    first = VECTORS if "response_features" in row else GOOD
    with pytest.raises(UserError, match=rf"data\.jsonl:3: .*{text}"):
        read(write_lines, first, "", row)


def test_vectors_of_another_size_than_the_first(write_lines):
    row = {"response_features": [[1, 2, 3], [4, 5, 6]], "y": 1}
    with pytest.raises(UserError, match=r"data.jsonl:2: vectors of size 3, but the first .* 2"):
        read(write_lines, VECTORS, row)


def test_extra_keys_may_be_ignored(write_lines):
    assert read(write_lines, {**GOOD, "note": 1}, extra_keys="ignore")[0].responses == ("c", "r")


def test_missing_empty_and_broken_files(tmp_path):
    def message_of(path):
        with pytest.raises(UserError) as caught:
            list(Jsonl(str(path)).records())
        return str(caught.value)

    assert "no such file" in message_of(tmp_path / "none.jsonl")
    assert "is a folder" in message_of(tmp_path)
    empty, blank, latin = (tmp_path / name for name in ("empty", "blank", "latin"))
    empty.touch()
    blank.write_text("\n \n")
    latin.write_bytes('{"prompt": "é"}\n'.encode("latin-1"))
    assert "the file is empty" in message_of(empty)
    assert "only blank lines" in message_of(blank)
    assert "latin:1: not UTF-8" in message_of(latin)
    with pytest.raises(UserError, match="the list of paths is empty"):
        list(Jsonl([]).records())


def test_a_list_is_its_untied_pairs(write_lines):
    """Four responses, two of one score: five pairs, the higher score preferred; keys of the list are each pair's."""
    path = write_lines(
        [
            {
                "user_id": "a",
                "prompt": "p",
                "responses": list("wxyz"),
                "scores": [1, 3, 1, 2.5],
                "group": "g",
            },
            {"prompt": "q", "chosen": "c", "rejected": "r"},
        ]
    )
    source = Jsonl(str(path))
    records = list(source.records())
    assert [(r.responses, r.label) for r in records[:-1]] == [
        (("w", "x"), 1), (("w", "z"), 1), (("x", "y"), -1), (("x", "z"), -1), (("y", "z"), 1),
    ]  # fmt: skip
    assert {(r.user_id, r.prompt, r.group) for r in records[:-1]} == {("a", "p", "g")}
    assert records[-1].responses == ("c", "r") and source.dropped == {"tie": 1}
    assert len(list(source.records())) == 6 and source.dropped == {"tie": 1}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"responses": ["a"], "scores": [1]}, "two or more"),
        ({"responses": ["a", "b"], "scores": [1]}, "2 numbers"),
        ({"responses": ["a", "b"], "scores": [1, "x"]}, "finite number"),
        ({"responses": ["a", "b"]}, "'scores' must be a list of 2 numbers"),
        ({"responses": ["a", None, "c"], "scores": [1, 2, 3]}, r"'responses\[1\]' is NoneType"),
        ({"responses": ["a", " ", "c"], "scores": [1, 1, 3]}, r"'responses\[1\]' is empty"),
        *(
            ({"responses": ["a", "b"], "scores": [1, 2], key: value}, f"'{key}' beside 'scores'")
            for key, value in (("chosen", "a"), ("response_1", "a"), ("y", 1), ("tie", False))
        ),
        ({"responses": ["a", "b"], "scores": [1, 2], "probability": 0.7}, "'probability' beside"),
    ],
)
def test_a_bad_list_is_named(write_lines, fields, text):
    path = write_lines([fields])
    with pytest.raises(UserError, match=text):
        list(Jsonl(str(path)).records())


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ({"y": 0}, "'y' is 0, a tie, beside 'chosen' and 'rejected'; give the two of a tie"),
        ({"y": 1}, "'y' is 1 beside 'chosen' and 'rejected'.* leave 'y' out"),
        ({"y": "x"}, "'y' is 'x' beside"),
        ({"tie": 1}, "'tie' is 1; it must be true or false"),
    ],
)
def test_a_preference_that_is_said_twice_is_refused(write_lines, said, text):
    path = write_lines([{"prompt": "p", "chosen": "c", "rejected": "r", **said}])
    with pytest.raises(UserError, match=text):
        list(Jsonl(str(path)).records())


def test_a_tie_that_is_no_truth_is_named_by_its_key(write_lines):
    path = write_lines([{"prompt": "p", "response_1": "c", "response_2": "r", "tie": "true"}])
    with pytest.raises(UserError, match="'tie' is 'true'; it must be true or false"):
        list(Jsonl(str(path)).records())


def test_csv_is_named_for_what_it_is(tmp_path):
    (tmp_path / "p.csv").write_text("user_id,prompt,chosen,rejected\na,b,c,d\n")
    with pytest.raises(UserError, match=r"p\.csv: is CSV by its name.*class_path: HuggingFace"):
        list(Jsonl(str(tmp_path / "p.csv")).records())
