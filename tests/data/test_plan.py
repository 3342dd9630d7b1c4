"""Which comparisons form which update depends on (seed, epoch, dataset) alone; splits cut, never move."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pal_ds.data.draws import gumbel_noise
from pal_ds.data.plan import UpdatePlan, split_update


def plan(
    num: int, batch: int, unit: str = "comparison", seed: int = 0, items: np.ndarray | None = None
) -> UpdatePlan:
    items = np.arange(num) // 3 if items is None else items
    return UpdatePlan(np.arange(100, 100 + num), items, batch, seed, "hash", unit)


@settings(deadline=None, max_examples=50)
@given(
    st.integers(1, 60),
    st.integers(1, 20),
    st.sampled_from(["comparison", "item"]),
    st.integers(0, 3),
)
def test_an_epoch_holds_every_comparison_once(num: int, batch: int, unit: str, epoch: int) -> None:
    found = plan(num, batch, unit)
    updates = [found.update(epoch, index) for index in range(found.updates_per_epoch)]
    assert sorted(np.concatenate(updates)) == list(range(100, 100 + num))
    assert all(len(update) == batch for update in updates[:-1])
    assert 1 <= len(updates[-1]) <= batch


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first = plan(50, 50)
    assert not np.array_equal(first.update(0, 0), first.update(1, 0))
    assert not np.array_equal(first.update(0, 0), plan(50, 50, seed=1).update(0, 0))
    # Asking for another epoch in between changes nothing: a resumed run starts anywhere.
    assert np.array_equal(plan(50, 50).update(1, 0), first.update(1, 0))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=40))
def test_items_stay_together(items: list[int]) -> None:
    found = plan(len(items), len(items), "item", items=np.asarray(items))
    order = np.asarray(items)[found.update(2, 0) - 100]
    changes = np.count_nonzero(np.diff(order)) + 1
    assert changes == len(set(items))


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 9))
def test_split_is_a_partition_with_equal_steps(num: int, world: int, micro: int) -> None:
    runs = split_update(num, world, micro)
    assert all(len(step) == world for step in runs)
    assert np.array_equal(np.concatenate([run for step in runs for run in step]), np.arange(num))
    assert max(len(run) for step in runs for run in step) <= micro
    # No more steps than needed: each costs collectives.
    assert (len(runs) - 1) * world * micro < num


def test_gumbel_noise_is_keyed_by_position() -> None:
    whole = gumbel_noise(3, 7, np.arange(10), 4)
    assert np.array_equal(whole[[8, 2]], gumbel_noise(3, 7, np.asarray([8, 2]), 4))
    assert not np.array_equal(whole, gumbel_noise(3, 8, np.arange(10), 4))
    assert not np.array_equal(whole, gumbel_noise(4, 7, np.arange(10), 4))


def test_gumbel_noise_is_gumbel() -> None:
    noise = gumbel_noise(0, 0, np.arange(20000), 5).ravel()
    assert noise.mean() == pytest.approx(0.5772, abs=0.02)
    assert noise.std() == pytest.approx(np.pi / np.sqrt(6), abs=0.02)
    first, second = noise.reshape(-1, 5)[:, 0], noise.reshape(-1, 5)[:, 1]
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
