"""Users from scratch read last states, leave ties out, and serve a world whose taste is linear as its truth does."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pal_ds.data.features import FeatureStore
from pal_ds.data.tables import COMPARISON_DTYPE
from pal_ds.eval.metrics import correctness
from pal_ds.eval.scratch_users import scratch_margins

H = 8


def collator_of(num_users: int, num_pairs: int, *, stored: bool) -> tuple[Any, np.ndarray]:
    """Users with a taste each, and which of their comparisons are ties; texts have 1 to 3 states, the last counts."""
    draw = np.random.default_rng(0)
    vectors = draw.standard_normal((40, H)).astype(np.float32)
    taste = draw.standard_normal((num_users, H))
    table = np.zeros(num_users * num_pairs, COMPARISON_DTYPE)
    table["user"] = np.repeat(np.arange(num_users), num_pairs)
    pairs = [draw.choice(40, 2, replace=False) for _ in table]
    table["a"], table["b"] = np.transpose(pairs)
    margin = ((vectors[table["b"]] - vectors[table["a"]]) * taste[table["user"]]).sum(1)
    table["label"] = np.where(np.arange(len(table)) % 10 == 3, 0, np.sign(margin))
    lengths = draw.integers(1, 4, 40)
    offsets = np.append(0, np.cumsum(lengths))
    states = draw.standard_normal((offsets[-1], H)).astype(np.float32)
    states[offsets[1:] - 1] = vectors
    store = FeatureStore(torch.from_numpy(states), offsets) if stored else None
    data = SimpleNamespace(comparisons=table, response_vectors=None if stored else vectors)
    return SimpleNamespace(data=data, response_store=store), margin


@pytest.mark.parametrize("stored", [False, True])
def test_a_linear_taste_is_learnt_from_ones_own_pairs(stored: bool) -> None:
    collator, margin = collator_of(3, 120, stored=stored)
    rows, users = np.arange(360), collator.data.comparisons["user"]
    is_test = rows % 3 == 0
    margins = scratch_margins(
        collator,
        fit_rows=rows[~is_test],
        fit_owner=users[~is_test],
        num_users=4,
        test_rows=np.append(rows[is_test], 0),
        # Of the last owner nothing is known.
        test_owner=np.append(users[is_test], 3),
    )
    assert correctness(margins[:-1], np.sign(margin[is_test])).mean() > 0.9
    assert margins[-1] == 0
    ties = scratch_margins(
        collator,
        fit_rows=rows[3::10],
        fit_owner=users[3::10],
        num_users=3,
        test_rows=rows,
        test_owner=users,
    )
    assert not ties.any(), "a tie takes no side"


def test_owners_may_share_comparisons() -> None:
    """Every draw of a user is an owner: the same comparisons make the same margins."""
    collator, _ = collator_of(2, 30, stored=False)
    rows, users = np.arange(60), collator.data.comparisons["user"].astype(np.int64)
    both = scratch_margins(
        collator,
        fit_rows=np.tile(rows, 2),
        fit_owner=np.concatenate([users, 2 + users]),
        num_users=4,
        test_rows=np.tile(rows, 2),
        test_owner=np.concatenate([2 + users, users]),
    )
    assert np.array_equal(both[:60], both[60:]) and (both != 0).all()
