"""Bad rows: a few are left out, counted and named under one rule, whichever source reads them; many are refused."""

import json
import logging
import re

import pytest

from pal_ds.data.bad_rows import BadRows
from pal_ds.data.build import build_tables
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.records import Record
from pal_ds.data.sources import Dsp, Gpt4Llm, HuggingFace, Jsonl, Persona, TextScore
from pal_ds.data.sources.base import Source
from pal_ds.data.tokenise import TextEncoder
from pal_ds.errors import UserError
from pal_ds.io.text_files import parse_json

GOOD = {"user_id": "u", "prompt": "p", "chosen": "yes", "rejected": "no"}
BAD = (
    ({**GOOD, "rejected": None}, "missing key 'rejected'"),
    ({**GOOD, "promt": "x"}, "unknown key 'promt'"),
    ({**GOOD, "chosen": " "}, "'chosen' is empty"),
    ({**GOOD, "margin": -1}, "'margin' is -1"),
    ("{broken", "not valid JSON"),
    ("[" * 5000 + "]" * 5000, "deeper than 200"),
    ("1" * 5000, "a number that cannot be read"),
    ('{"a": "cut \\ud83d"}', "half of a surrogate pair"),
    ('{"user_id": "a", "user_id": "b"}', "the key 'user_id' stands twice"),
)


@pytest.mark.parametrize(("bad", "rule"), BAD)
def test_one_bad_row_of_300_is_left_out_and_named(write_lines, tmp_path, caplog, bad, rule):
    lines = [{**GOOD, "prompt": f"p {i}"} for i in range(299)]
    lines.insert(170, bad)
    source = Jsonl(write_lines(lines))
    with caplog.at_level(logging.WARNING):
        data = prepare(DataConfig(path=str(tmp_path / "D"), source=source, vocab_size=300))
    assert data.info["dropped"] == {"bad_row": 1} and len(data.comparisons) == 299
    assert "1 of 300 rows are bad" in caplog.text
    assert "data.jsonl:171: " in caplog.text and rule in caplog.text


@pytest.mark.parametrize("split", ["field", "record"])
@pytest.mark.parametrize("bad", [{}, {"split": "validation"}, {"split": None}])
def test_a_row_that_names_no_split_is_a_bad_row(write_lines, tmp_path, caplog, split, bad):
    lines = [{**GOOD, "prompt": f"p {i}", "split": "train"} for i in range(299)]
    lines.insert(170, {**GOOD, "prompt": "q", **bad})
    source = Jsonl(write_lines(lines))
    config = DataConfig(path=str(tmp_path / "D"), source=source, vocab_size=300, split=split)
    with caplog.at_level(logging.WARNING):
        data = prepare(config, quiet=True)
    assert data.info["dropped"] == {"bad_row": 1} and len(data.comparisons) == 299
    assert re.search(r"data\.jsonl:171: '?split'? is ", caplog.text)
    config = DataConfig(
        path=str(tmp_path / "E"), source=source, vocab_size=300, split=split, max_bad_rows=0
    )
    with pytest.raises(UserError, match=r"data\.jsonl:171: '?split'? is "):
        prepare(config, quiet=True)


def test_more_than_the_share_are_refused_with_reasons(write_lines, tmp_path):
    lines = [{**GOOD, "prompt": f"p {i}"} for i in range(296)]
    lines += [BAD[0][0]] * 3 + [BAD[2][0]]
    source = Jsonl(write_lines(lines))
    config = DataConfig(path=str(tmp_path / "D"), source=source, vocab_size=300)
    with pytest.raises(UserError) as caught:
        prepare(config, quiet=True)
    said = str(caught.value)
    assert said.startswith(f"{source.path}:297: missing key 'rejected'")
    assert "4 of 300 rows are bad; data.max_bad_rows, 0.01," in said
    assert "(3 such rows)" in said and "data.jsonl:300: 'chosen' is empty" in said
    assert not (tmp_path / "D").exists()
    config = DataConfig(path=str(tmp_path / "D"), source=source, vocab_size=300, max_bad_rows=0.02)
    assert prepare(config, quiet=True).info["dropped"] == {"bad_row": 4}


def test_none_may_be_bad(write_lines, tmp_path):
    source = Jsonl(write_lines([*[GOOD] * 299, BAD[0][0]]))
    config = DataConfig(path=str(tmp_path / "D"), source=source, max_bad_rows=0)
    with pytest.raises(UserError, match=r"data.jsonl:300: missing key 'rejected'"):
        prepare(config, quiet=True)
    with pytest.raises(UserError, match=r"data.max_bad_rows is 2; it is a share of the rows"):
        DataConfig(path="D", max_bad_rows=2)


def test_a_file_of_nothing_else_is_refused_after_its_first_rows(write_lines):
    source = Jsonl(write_lines([*[{"a": 1}] * 150, *[GOOD] * 10**4]))
    with pytest.raises(UserError, match="100 of 100 rows are bad"):
        list(source.records())


STATEMENT = {"question": "Tea?", "answer_matching_behavior": "Yes"}


@pytest.mark.parametrize(
    ("make", "good"),
    [
        (HuggingFace, GOOD),
        (TextScore, {"text": ["q\n\nAssistant: a", "q\n\nAssistant: b"], "score": [1, 2]}),
        (Dsp, {"query": "q", "responses": {"a": "x", "b": "y"}}),
        (
            Gpt4Llm,
            {
                "user_input": "q",
                "responses_and_scores": [
                    {"response": "a", "score": 1},
                    {"response": "b", "score": 2},
                ],
            },
        ),
        (lambda path: Persona(path, users={"u": {"holds": ["data"]}}), STATEMENT),
    ],
)
def test_the_rule_is_the_same_in_every_source(write_lines, make, good):
    lines = [*[good] * 150, {"odd": 1}, "{broken", *[good] * 148]
    source = make(write_lines(lines))
    assert len(list(source.records())) >= 298
    assert source.bad_rows.counts() == {"bad_row": 2}
    source.bad_rows.largest_share = 0
    with pytest.raises(UserError, match=r"data.jsonl:151: "):
        list(source.records())


class Own(Source):
    """A source of one's own, which says nothing of where its records come from."""

    def records(self):
        for i in range(300):
            yield Record("u", -1, prompt=f"p {i}", responses=("yes", " " if i == 150 else "no"))

    def describe(self):
        return {}


def test_records_of_ones_own_source_are_named_by_number(bpe, tmp_path, caplog):
    source = Own()
    data = build_tables(source.records(), tmp_path / "D", TextEncoder(bpe), source=source)
    assert data.info["dropped"] == {"bad_row": 1} and len(data.comparisons) == 299
    assert "record 151 (user 'u'): a response is empty" in caplog.text


def test_shares_do_not_depend_on_the_reading():
    """A source is read several times; each reading counts anew."""
    bad_rows = BadRows()
    bad_rows.add("x", UserError("x: y"))
    bad_rows.clear()
    bad_rows.num_good = 99
    bad_rows.add("x", UserError("x: y"))
    bad_rows.check()
    assert bad_rows.counts() == {"bad_row": 1}


@pytest.mark.parametrize("text", ["\u2028", "\u0085", "a\u2029b", "\x0b", "\x1c"])
def test_only_a_line_feed_ends_a_line(write_lines, text):
    path = write_lines([json.dumps({**GOOD, "chosen": f"a{text}b"}, ensure_ascii=False)])
    (record,) = Jsonl(path).records()
    assert record.responses[0] == f"a{text}b"


def test_whole_pairs_and_deep_values_that_are_allowed():
    assert parse_json('"\\ud83d\\ude00"', "x") == "\U0001f600"
    assert parse_json("[" * 150 + "]" * 150, "x")
    with pytest.raises(UserError, match="deeper than 200"):
        parse_json("[" * 250 + "]" * 250, "x")


def test_an_entry_that_names_its_user_is_that_users(write_lines):
    entry = {"text": ["q\n\nAssistant: a", "q\n\nAssistant: b"], "score": [1, 2]}
    source = TextScore(write_lines([entry, {**entry, "user_id": "bob"}]))
    assert [record.user_id for record in source.records()] == ["population", "bob"]


class Lists(Source):
    """A source of one's own whose rows are lists of comparisons, one of them with two bad ones."""

    def records(self):
        def comparisons(where, row):
            for i in range(10):
                label = 7 if row == 100 and i > 7 else -1
                yield Record("u", label, prompt=f"p {row}", responses=("yes", f"no {i}"))

        yield from self.each_row(((f"row {row}", row) for row in range(200)), comparisons)

    def describe(self):
        return {}


def test_bad_comparisons_of_a_list_are_one_bad_row(bpe, tmp_path):
    source = Lists()
    data = build_tables(source.records(), tmp_path / "D", TextEncoder(bpe), source=source)
    assert len(data.comparisons) == 1998 and data.info["dropped"] == {"bad_row": 1}
    assert (source.bad_rows.num_good, source.bad_rows.num_bad) == (199, 1)


REASONS = {
    "'y' is {!r}; it must be -1 or 1": ("two", 0.5, 3, "a b"),
    "{} cells under 3 columns; quote cells": (4, 5, 17),
    "not valid JSON (Expecting value at column {}); every line": (1, 20, 300),
    "not UTF-8 ('utf-8' codec can't decode byte {} in position 7)": ("0xe9", "0xff", "0x80"),
    "'prompt' message {} is {{'role': 3}}; a message is an object.": (0, 1, 2),
}


@pytest.mark.parametrize(("rule", "values"), REASONS.items())
def test_one_reason_with_other_values_is_one(rule, values):
    bad_rows = BadRows(0.5)
    bad_rows.num_good = 10
    for number, value in enumerate(values, start=1):
        bad_rows.add(f"x:{number}", UserError(f"x:{number}: {rule.format(value)}"))
    assert len(bad_rows.reasons) == 1
    first = f"x:1: {rule.format(values[0])}".removesuffix(".")
    assert bad_rows.summary() == f"{first} ({len(values)} such rows)"


def test_other_rules_and_columns_are_other_reasons():
    bad_rows = BadRows(0.5)
    for said in (
        "'chosen' is empty; every response needs text",
        "'rejected' is empty; every response needs text",
        "'chosen' is int; it must be text",
        "missing key 'chosen'",
        "missing key 'prompt'",
        "unknown key 'a'",
    ):
        bad_rows.num_good += 1
        bad_rows.add("x", UserError(f"x: {said}."))
    assert len(bad_rows.reasons) == 6 and ".;" not in bad_rows.summary()


def test_a_message_that_ends_in_a_full_stop_gets_no_second_one():
    bad_rows = BadRows()
    bad_rows.num_good = 1
    bad_rows.add("x:1", UserError("x:1: 'a' is 1. Mend it."))
    bad_rows.add("x:2", UserError("x:2: 'b' is 1. Mend it."))
    with pytest.raises(UserError) as refused:
        bad_rows.check()
    assert ".." not in str(refused.value) and ".;" not in str(refused.value)
