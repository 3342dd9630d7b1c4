"""Compact user ids against plain lists and dicts."""

import random

import numpy as np
import pyarrow as pa
import pytest

from pal_ds.errors import UserError
from pal_ds.users import ids as user_ids
from pal_ds.users.ids import UserIds

ALPHABET = "ab\0é长😀"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_ids, "_CHUNK", 7)


def some_ids(seed: int, count: int = 60) -> list[str]:
    """Distinct, of all lengths and scripts; many are another's beginning."""
    draw, found = random.Random(seed), dict[str, None]()
    while len(found) < count:
        found["".join(draw.choices(ALPHABET, k=draw.randint(1, 5)))] = None
    return list(found)


@pytest.mark.parametrize("seed", range(5))
def test_look_up_is_that_of_a_dict(seed: int) -> None:
    ids = some_ids(seed)
    compact, rows = UserIds.of(ids), {user: row for row, user in enumerate(ids)}
    asked = some_ids(seed + 100) + ids[::3] + ids[:2]
    random.Random(seed).shuffle(asked)
    assert compact.find(asked).tolist() == [rows.get(user, -1) for user in asked]
    assert any(user in compact for user in asked) and not all(user in compact for user in asked)
    assert compact.missing_from(UserIds.of(asked)) == sorted(set(ids) - set(asked))
    assert compact.repeated() == []
    assert sorted(UserIds.of([*ids, ids[3], ids[9], ids[3]]).repeated()) == sorted({ids[3], ids[9]})


def test_it_is_the_sequence_it_was_made_of() -> None:
    ids = some_ids(0)
    compact = UserIds.of(iter(ids))
    assert list(compact) == ids and compact == ids and ids == compact and len(compact) == len(ids)
    assert (compact[0], compact[-1], compact[np.int64(5)]) == (ids[0], ids[-1], ids[5])
    for part in (slice(3, 50), slice(None, None, -1), slice(9, 3), slice(5, None), slice(0, 60, 7)):
        assert compact[part] == ids[part]
    rows = np.random.default_rng(0).integers(len(ids), size=100)
    assert compact.take(rows) == [ids[row] for row in rows]
    assert compact[:20].joined(UserIds.of(()), compact[20:25], compact[25:]) == ids
    assert (
        compact != ids[:-1] and compact != [*ids[:-1], "other"] and compact != UserIds.of(ids[1:])
    )
    with pytest.raises(IndexError):
        compact[len(ids)]


def test_arrow_columns_come_and_go() -> None:
    ids = some_ids(1)
    for column in (
        pa.chunked_array([ids]),
        pa.chunked_array([ids[:10], [], ids[10:]], pa.string()),
        pa.chunked_array([["cut", *ids]]).slice(1),
        pa.chunked_array([ids], pa.large_string()),
    ):
        assert UserIds.from_arrow(column) == ids
    assert UserIds.from_arrow(pa.chunked_array([], pa.string())) == []
    assert UserIds.of(ids)[5:9].to_arrow().to_pylist() == ids[5:9]
    assert UserIds.of(ids).to_arrow().type == pa.string()


def test_empty_ids_and_half_characters_are_refused() -> None:
    with pytest.raises(UserError, match="at least one character"):
        UserIds.of(["a", ""])
    with pytest.raises(UserError, match="surrogate"):
        UserIds.of(["\ud800"])
