"""Whatever a source of one's own puts into a record is told by field and rule, and is one bad row among others."""

import logging
from collections.abc import Iterator

import numpy as np
import pytest

from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.record_checks import fault_of
from pal_ds.data.records import Record
from pal_ds.data.sources.base import Source
from pal_ds.errors import UserError

NO_TEXT = [{"role": "assistant"}]
PAIR = ((1.0, 2.0), (3.0, 4.0))
FAULTS = [
    *({"label": value} for value in (2, 0.5, float("nan"), "1", True, None)),
    *({"user_id": value} for value in (5, None, "", " ", "\u3000\n")),
    *({"responses": value} for value in (None, ("a",), ("a", "b", "c"), "ab", (1, 2), (None, "b"))),
    *({"responses": ("a", value)} for value in ([], NO_TEXT, [{"content": "x"}], ["x"])),
    *({"prompt": value} for value in (5, {"role": "user", "content": "x"}, [])),
    *({"margin": value} for value in ("x", -1.0, float("nan"), 1e39, None, True)),
    *({"probability": value} for value in (2.0, "x", float("nan"), True)),
    {"soft": True},
    {"soft": True, "probability": 0.3, "label": 1},
    {"soft": True, "probability": 0.3, "label": 0},
    {"label": 0, "margin": 1.0},
    *({"group": value} for value in (5, "", " ")),
    {"seen": "no"},
    {"controversial": "x"},
    *({"tools": value} for value in ("x", ["x"])),
    {"response_features": PAIR},
    {"prompt_features": (1.0,)},
    *(
        {"responses": None, "prompt": None, "response_features": value}
        for value in (((1.0,), ()), ((1.0,), (float("inf"),)), ((1.0,), ("x",)), ((1.0,), 2.0))
    ),
    {"responses": None, "prompt": None, "response_features": (np.ones(2), np.full(2, 1e300))},
    {"responses": None, "response_features": PAIR},
]


def record_of(**fields: object) -> Record:
    return Record(**{"user_id": "u", "label": 1, "prompt": "p", "responses": ("a b", "c")} | fields)


@pytest.mark.parametrize("fields", FAULTS, ids=str)
def test_a_fault_is_told_by_its_field(fields: dict[str, object]) -> None:
    fault = fault_of(record_of(**fields))
    assert fault is not None and any(name.rstrip("s") in fault for name in fields)


def test_sound_records_have_no_fault() -> None:
    said = [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}]
    features = {"prompt": None, "responses": None}
    for fields in (
        {},
        {"label": np.int8(-1), "margin": np.float32(2.0), "probability": np.float64(0.1)},
        {"responses": ["a", "b"], "group": "g", "seen": np.bool_(False), "controversial": True},
        {"responses": ([{"role": "assistant", "content": "x"}], said), "tools": [{"name": "f"}]},
        {"soft": True, "probability": 0.5},
        {"label": 0, "probability": 0.9},
        {**features, "response_features": PAIR, "prompt_features": (1, 2)},
        {**features, "response_features": (np.ones(2), np.zeros(2, np.float32))},
    ):
        assert fault_of(record_of(**fields)) is None, fields


class Own(Source):
    """300 records, one of them with the fields that are given."""

    def __init__(self, fields: dict[str, object], facts: object = None) -> None:
        self.fields, self.facts = fields, facts or {}

    def records(self) -> Iterator[Record]:
        """Yield the records; the first is the other one."""
        for number in range(300):
            of_one = self.fields if number == 0 else {}
            yield record_of(**{"prompt": f"p {number}", "user_id": f"u{number % 2}", **of_one})

    def describe(self) -> dict:
        if self.facts == "raise":
            raise KeyError("size")
        return self.facts  # type: ignore[return-value]


@pytest.mark.parametrize(
    "fields", [{"user_id": 5}, {"responses": (1, 2)}, {"label": "1"}, {"response_features": PAIR}]
)
def test_it_is_one_bad_row_among_good_ones(fields, tmp_path, caplog) -> None:
    config = DataConfig(path=str(tmp_path / "D"), source=Own(fields), vocab_size=300)
    with caplog.at_level(logging.WARNING):
        data = prepare(config, quiet=True)
    assert data.info["dropped"] == {"bad_row": 1} and len(data.comparisons) == 299
    assert "record 1 (user" in caplog.text and "mend or leave out the record" in caplog.text


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (("a", "b"), "returns tuple; it must return a dict"),
        ({"topics": {1, 2}}, "returns what JSON cannot hold .*set"),
        ("raise", r"describe\(\) raised KeyError \('size'\) at .*test_record_checks.py:\d+. Mend"),
    ],
)
def test_what_a_source_says_of_itself_is_checked(facts: object, words: str, tmp_path) -> None:
    config = DataConfig(path=str(tmp_path / "D"), source=Own({}, facts), vocab_size=300)
    with pytest.raises(UserError, match=words):
        prepare(config, quiet=True)
