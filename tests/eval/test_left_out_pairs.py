"""Comparisons that share a response, against a loop over all pairs of them."""

import numpy as np

from pal_ds.eval.left_out_pairs import Sharing


def test_sharing_is_that_of_a_loop() -> None:
    draw = np.random.default_rng(0)
    responses, owner = draw.integers(0, 9, (40, 2)), draw.integers(0, 4, 40)
    sharing = Sharing.of(responses, owner)
    for one in range(40):
        expected = [
            other
            for other in range(40)
            if owner[other] == owner[one] and {*responses[one]} & {*responses[other]}
        ]
        first, end = sharing.first[one : one + 2]
        assert sharing.comparison[first:end].tolist() == expected


def test_columns_are_those_of_a_users_row() -> None:
    """Two users of three and two comparisons, interleaved; a row's padding shares nothing."""
    responses = np.asarray([[0, 1], [0, 1], [1, 2], [2, 3], [4, 5]])
    sharing = Sharing.of(responses, np.asarray([0, 1, 0, 1, 0]))
    rows, is_one = np.asarray([[0, 2, 4], [1, 3, 0]]), np.asarray([[True] * 3, [True, True, False]])
    columns, is_shared = sharing.within(rows, is_one, 2)
    shared = [
        [row[real].tolist() for row, real in zip(*both, strict=True)]
        for both in zip(columns, is_shared, strict=True)
    ]
    assert shared == [[[0, 1], [0, 1], [2]], [[0], [1], []]]
    assert Sharing.of(np.empty((0, 2), np.int64), np.empty(0, np.int64)).counts.size == 0
