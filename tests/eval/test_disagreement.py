"""Which comparisons users disagree on, from tables made by hand."""

import numpy as np

from pal_ds.data.tables import COMPARISON_DTYPE
from pal_ds.eval.metrics import controversial


def table(*rows: tuple[int, int, int, int]) -> np.ndarray:
    """Of (user, a, b, label)."""
    made = np.zeros(len(rows), COMPARISON_DTYPE)
    made["controversial"] = -1
    for name, column in zip(("user", "a", "b", "label"), np.asarray(rows).T, strict=True):
        made[name] = column
    return made


def test_opposite_labels_of_two_users_in_either_order() -> None:
    rows = table(
        (0, 1, 2, -1),  # prefers 1
        (1, 2, 1, -1),  # prefers 2, of the same two responses
        (5, 1, 2, -1),  # a third user, with the first: the pair is controversial for all
        (0, 1, 3, -1),  # prefers 1
        (1, 3, 1, +1),  # prefers 1 as well
        (2, 4, 5, +1),  # nobody else judged these
    )
    assert controversial(rows).tolist() == [True, True, True, False, False, False]


def test_a_user_at_odds_with_themselves_alone_is_none() -> None:
    rows = [(7, 1, 2, -1), (7, 1, 2, +1)]
    assert not controversial(table(*rows)).any()
    assert controversial(table(*rows, (8, 1, 2, -1))).all()
    assert controversial(table((0, 0, 1, 1))[:0]).tolist() == []


def test_what_a_source_says_goes_first() -> None:
    rows = table((0, 1, 2, -1), (1, 2, 1, -1), (0, 3, 4, 1))
    rows["controversial"] = [0, -1, 1]
    assert controversial(rows).tolist() == [False, True, True]


def test_like_a_loop_over_users() -> None:
    generator = np.random.default_rng(0)
    drawn = [(*generator.integers(0, 6, 3), generator.choice([-1, 1])) for _ in range(60)]
    rows = [tuple(map(int, row)) for row in drawn if row[1] != row[2]]
    liked = [(b if label > 0 else a) for _, a, b, label in rows]
    expected = [
        any(
            {a, b} == {c, d} == {e, f} and u != v and liked[j] != liked[k]
            for j, (u, c, d, _) in enumerate(rows)
            for k, (v, e, f, _) in enumerate(rows)
        )
        for _, a, b, _ in rows
    ]
    found = controversial(table(*rows)).tolist()
    assert found == expected and len(set(found)) == 2
