"""Baselines that do not read, against counts made by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pal_ds.data.ragged import Ragged
from pal_ds.data.tables import COMPARISON_DTYPE
from pal_ds.eval.baselines import FormatBaseline, length_margins

END, TEMPLATE = 9, 8


def data_of(texts: list[list[int]], rows: list[tuple[int, int, int]], num_train: int) -> Any:
    """Of (a, b, label); those after the first `num_train` are test."""
    table = np.zeros(len(rows), COMPARISON_DTYPE)
    for name, column in zip(("a", "b", "label"), np.asarray(rows).T, strict=True):
        table[name] = column
    offsets = np.cumsum([0, *map(len, texts)])
    return SimpleNamespace(
        comparisons=table,
        responses=Ragged(np.concatenate(texts), offsets),
        response_num_chars=np.asarray([10 * len(text) for text in texts], np.int32),
        rows=lambda split: np.arange(num_train if split == "train" else len(rows)),
    )


# First tokens 1, 2 and 3, last tokens 4, 5 and 6 before an end that all have.
TEXTS = [[1, 7, 4], [2, 4], [1, 7, 7, 5], [3, 6], [2]]
TEXTS = [[*text, END, TEMPLATE] for text in TEXTS]


def test_log_odds_of_first_and_last_token() -> None:
    rows = [(0, 1, -1), (2, 1, -1), (3, 2, +1), (1, 0, +1), (4, 3, -1), (3, 0, -1)]
    data = data_of(TEXTS, rows, num_train=4)
    looks = FormatBaseline.of(data)
    assert looks is not None and looks.num_end == 2
    # Won: responses 0, 2, 2 and 0; lost: 1, 1, 3 and 1.
    assert looks.first[[1, 2, 3]] == pytest.approx(np.log([5, 1 / 4, 1 / 2]))
    assert looks.last[[4, 5, 6]] == pytest.approx(np.log([3 / 4, 3, 1 / 2]))
    assert looks.last[1] == looks.first[4] == 0
    margins = looks.margins(data, data.comparisons)
    assert margins is not None
    first, second = np.log(5 * 3 / 4), np.log(1 / 4 * 3 / 4)
    assert margins[0] == pytest.approx(second - first)
    # Response 4 is one token, its first and its last; 2 was never counted as a last one.
    assert margins[4] == pytest.approx(np.log(1 / 2 * 1 / 2) - np.log(1 / 4))
    assert length_margins(data, data.comparisons)[:2].tolist() == [-10.0, -20.0]  # type: ignore[index]


def test_tokens_that_were_never_counted_say_nothing() -> None:
    looks = FormatBaseline.of(data_of(TEXTS, [(0, 1, -1)], num_train=1))
    other = data_of([[500, 600, END, TEMPLATE], [1, 600, END, TEMPLATE]], [(0, 1, 1)], num_train=0)
    assert looks is not None
    margins = looks.margins(other, other.comparisons)
    assert margins is not None and margins.tolist() == pytest.approx([np.log(2)])


def test_vectors_and_an_empty_training_split_have_no_looks() -> None:
    data = data_of(TEXTS, [(0, 1, -1)], num_train=0)
    assert FormatBaseline.of(data) is None
    data = data_of(TEXTS, [(0, 1, -1)], num_train=1)
    looks = FormatBaseline.of(data)
    data.responses = data.response_num_chars = None
    assert looks is not None and looks.margins(data, data.comparisons) is None
    assert FormatBaseline.of(data) is None and length_margins(data, data.comparisons) is None
