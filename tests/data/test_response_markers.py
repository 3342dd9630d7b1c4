"""The vectorised search for misplaced markers says what `find_prompt_length` says, row by row."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pal_ds.data.ragged import Ragged
from pal_ds.data.response_markers import common_marker
from pal_ds.data.stores import CODE, TokenTables, _misplaced
from pal_ds.remote_code.canonical import find_prompt_length

TOKENS = st.lists(st.integers(0, 2), max_size=8)
MARKER = st.lists(st.integers(0, 2), min_size=1, max_size=3)


def ragged(rows: list[list[int]]) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Ragged(np.array([t for row in rows for t in row], np.int32), offsets)


def found(ids: list[int], marker: list[int], user_marker: list[int] | None) -> int | None:
    try:
        return find_prompt_length(ids, marker, user_marker)
    except ValueError:
        return None


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(TOKENS, TOKENS), min_size=1, max_size=6), MARKER, st.none() | MARKER)
def test_accepted_rows_are_those_whose_boundary_is_found(pairs, marker, user_marker):
    # As in the tables: every prompt ends with the marker, every response holds at least one token.
    prompts = [head + marker for head, _ in pairs]
    responses = [[*tail, 0] for _, tail in pairs]
    rows = np.arange(len(pairs))
    tables = TokenTables(
        ragged(prompts), ragged(responses), rows, rows, rows * 0, marker, user_marker, None
    )
    codes = _misplaced(tables, marker, user_marker)
    for prompt, response, code in zip(prompts, responses, codes.tolist(), strict=True):
        boundary = found(prompt + response, marker, user_marker)
        if code == 0:
            assert boundary == len(prompt)
        elif user_marker is None and len(response) >= len(marker):
            assert boundary is None
        assert code in (0, CODE["marker_in_prompt"], CODE["marker_in_response"])


def test_the_longest_end_that_almost_all_share():
    assert common_marker([(1, 2, 3), (9, 2, 3)], [500, 500]) == [2, 3]
    assert common_marker([(1, 2, 3), (2, 3), ()], [999, 0, 1]) == [1, 2, 3]
    assert common_marker([(1,), (2,)], [60, 40]) == [1]
    assert common_marker([()], [10]) is None
    assert common_marker([], []) is None


def test_take_copies_rows_in_the_order_asked():
    table = ragged([[1, 2], [], [3]])
    taken = table.take(np.array([2, 0, 1, 2]))
    assert [taken[i].tolist() for i in range(4)] == [[3], [1, 2], [], [3]]
    assert len(ragged([[]]).take(np.array([0]))) == 1
