"""Words about prepared data: ids that differ only where no reader sees it."""

import json
import logging
import unicodedata

import pytest

from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.summary import alike_ids
from pal_ds.errors import UserError
from pal_ds.users.ids import UserIds

NFC, NFD = (unicodedata.normalize(form, "Zoë") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    ("ids", "alike"),
    [
        (["a", "A", "a b", "a  b", "ab"], []),
        (["a", " a", "a\t", "b"], [["a", " a", "a\t"]]),
        ([" a", "a\n"], [[" a", "a\n"]]),
        ([NFD, "x", NFC], [[NFC, NFD]]),
        ([NFD + " ", NFC], [[NFC, NFD + " "]]),
        ([NFC, " x", "\u00a0", "é"], []),
        ([" ", "\t"], [[" ", "\t"]]),
    ],
)
def test_alike_ids(ids: list[str], alike: list[list[str]]) -> None:
    assert alike_ids(UserIds.of(ids)) == alike


def test_alike_users_and_groups_are_counted_and_shown(tmp_path, caplog) -> None:
    users = ["mia", " mia", NFC, NFD, *(f"u{i}{end}" for i in range(3) for end in ("", " "))]
    lines = [
        {
            "user_id": user,
            "prompt": f"p {i}",
            "chosen": "a",
            "rejected": "b",
            "group": f"g{i % 2 * ' '}",
        }
        for i, user in enumerate(users)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(path=str(tmp_path / "D"), source=Jsonl(str(path)), vocab_size=300)
    with caplog.at_level(logging.WARNING):
        data = prepare(config, quiet=True)
    assert len(data.users) == 10
    (of_users,) = (m for m in caplog.messages if "10 users have ids that differ in blank" in m)
    assert "'mia' and ' mia'" in of_users and repr(NFD) in of_users and "; ..." in of_users
    assert "u2" not in of_users, "the first ones are shown"
    assert any("2 groups have ids" in message for message in caplog.messages)
    caplog.clear()
    path.write_text("".join(json.dumps(line | {"group": "g"}) + "\n" for line in lines[:1]))
    prepare(DataConfig(path=str(tmp_path / "E"), source=Jsonl(str(path)), vocab_size=300))
    assert "blank space around" not in caplog.text


@pytest.mark.parametrize("max_length", [0, -1])
def test_a_length_of_none_is_no_default(tmp_path, max_length) -> None:
    with pytest.raises(UserError, match=f"data.max_length is {max_length}; it must be at least 1"):
        DataConfig(path=str(tmp_path / "D"), max_length=max_length)


@pytest.mark.parametrize("num_nameless", [0, 3])
def test_records_without_a_user_among_others_are_counted(tmp_path, caplog, num_nameless) -> None:
    lines = [{"prompt": f"p {i}", "chosen": "a", "rejected": "b"} for i in range(30)]
    lines = [
        line | ({"user_id": f"u{i % 4}"} if i >= num_nameless else {})
        for i, line in enumerate(lines)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(path=str(tmp_path / "D"), source=Jsonl(str(path)), vocab_size=300)
    with caplog.at_level(logging.WARNING):
        prepare(config, quiet=True)
    assert ("3 of 30 comparisons name no user" in caplog.text) == (num_nameless > 0)
