"""Canonical ids and the search for the prompt's end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pal_ds.remote_code.canonical import canonical_ids, find_prompt_length

IDS = st.lists(st.integers(10, 20), min_size=1, max_size=30)


@given(IDS, st.booleans(), st.booleans(), st.sampled_from([[], [1], [1, 2]]))
def test_specials_are_there_exactly_once(ids, with_prefix, with_end, prefix):
    given_ids = (prefix if with_prefix else []) + ids + ([3] if with_end else [])
    assert canonical_ids(given_ids, prefix, [3]) == prefix + ids + [3]
    assert canonical_ids(canonical_ids(given_ids, prefix, [3]), prefix, [3]) == prefix + ids + [3]


@given(IDS, st.integers(3, 40))
def test_cut_keeps_prefix_and_end(ids, max_length):
    whole = canonical_ids(ids, [1], [3])
    cut = canonical_ids(ids, [1], [3], max_length)
    assert len(cut) == min(len(whole), max_length)
    assert cut[0] == 1 and cut[1:] == whole[len(whole) - len(cut) + 1 :]


def test_double_specials_and_none_at_all():
    assert canonical_ids([1, 1, 10, 3, 3], [1], [3]) == [1, 10, 3]
    assert canonical_ids([1, 10, 3], [], []) == [1, 10, 3]


def test_no_room_is_an_error():
    with pytest.raises(ValueError, match="max_length 1 leaves no room"):
        canonical_ids([10, 11], [1], [3], 1)


def test_prompt_length():
    assert find_prompt_length([5, 7, 8, 9], [7, 8]) == 3
    assert find_prompt_length([6, 5, 7, 5, 6, 5, 7, 9], [7], [6]) == 7
    with pytest.raises(ValueError, match="no response marker"):
        find_prompt_length([5, 8, 7], [7, 8])
    with pytest.raises(ValueError, match="2 response markers"):
        find_prompt_length([5, 7, 5, 7, 9], [7])
    with pytest.raises(ValueError, match="explains 1"):
        find_prompt_length([6, 5, 7, 5, 7, 9], [7], [6])


def test_an_end_token_that_is_also_the_marker_starts_no_response():
    assert find_prompt_length([2, 5, 3, 6, 3], [3]) == 3
    with pytest.raises(ValueError, match="no response marker"):
        find_prompt_length([2, 5, 3], [3])
    with pytest.raises(ValueError, match="2 response markers"):
        find_prompt_length([2, 5, 3, 6, 3, 7, 3], [3])


def test_a_response_may_be_empty_where_no_other_marker_can_be_its_own():
    def length(*arguments: list[int]) -> int:
        return find_prompt_length(*arguments, may_be_empty=True)

    assert length([5, 7, 8], [7, 8]) == 3
    assert length([5, 7, 9, 7], [7]) == 2, "the response ends in a marker; it is not the boundary"
    assert length([6, 5, 7, 5, 6, 5, 7], [7], [6]) == 7
    with pytest.raises(ValueError, match="no response marker"):
        length([5, 9], [7])
    with pytest.raises(ValueError, match="2 response markers"):
        length([5, 7, 5, 7, 9], [7])
