"""The order of comparisons and their membership in updates depend on nothing of the launch."""

from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pal_ds.data.batch import Batch
from pal_ds.data.collator import Collator
from pal_ds.data.draws import Draws
from pal_ds.data.loader import UpdateInputs, UpdateSource, updates_from
from pal_ds.data.plan import UpdatePlan, split_by_tokens
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.split_packed import padded_lengths
from pal_ds.data.tables import PreparedData
from tests.tiny import write_pairs

BATCH_PAIRS = 13


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("loader")
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 60)))
    options = {"max_length": 80, "vocab_size": 300, "dev_fraction": 0, "test_fraction": 0}
    return prepare(DataConfig(path=str(folder / "data"), source=source, **options), quiet=True)


def source_of(
    data: PreparedData,
    *,
    rank: int = 0,
    world_size: int = 1,
    pairs: int = 4,
    tokens: int | None = None,
    seed: int = 0,
    unit: str = "comparison",
) -> UpdateSource:
    rows = data.rows("train")
    items = data.response_prompt[data.comparisons["a"][rows]]
    plan = UpdatePlan(rows, items, BATCH_PAIRS, seed, data.hash, unit)
    return UpdateSource(
        plan, Collator(data), rank, world_size, pairs, tokens, Draws(seed, 3, frozenset({"gumbel"}))
    )


def order_of(inputs: list[UpdateInputs]) -> list[list[int]]:
    """Rows of one update as the ranks' batches hold them, put back in global order."""
    found = {}
    for rank, part in enumerate(inputs):
        for step, batch in zip(part.runs, part.batches, strict=True):
            real = batch.position >= 0
            assert batch.position[real].tolist() == step[rank].tolist()
            for position, user in zip(batch.position[real], batch.user_row[real], strict=True):
                found[int(position)] = (int(part.rows[position]), int(user))
    return [list(found[position]) for position in sorted(found)]


@settings(deadline=None, max_examples=40)
@given(
    world_size=st.integers(1, 5),
    pairs=st.integers(1, 20),
    tokens=st.one_of(st.none(), st.integers(1, 3000)),
    unit=st.sampled_from(["comparison", "item"]),
    update=st.integers(0, 11),
)
def test_updates_are_the_same_however_they_are_split(
    data: PreparedData, world_size: int, pairs: int, tokens: int | None, unit: str, update: int
) -> None:
    alone = source_of(data, pairs=BATCH_PAIRS, unit=unit)[update]
    ranks = [
        source_of(data, rank=rank, world_size=world_size, pairs=pairs, tokens=tokens, unit=unit)[
            update
        ]
        for rank in range(world_size)
    ]
    table = data.comparisons[alone.rows]
    expected = [[int(row), int(user)] for row, user in zip(alone.rows, table["user"], strict=True)]
    assert order_of(ranks) == expected
    assert len({len(part.batches) for part in ranks}) == 1


@settings(deadline=None, max_examples=6)
@given(num_workers=st.integers(1, 2), first=st.integers(0, 6), tokens=st.sampled_from([None, 600]))
def test_workers_change_nothing(
    data: PreparedData, num_workers: int, first: int, tokens: int | None
) -> None:
    """Also when a resumed run begins in the middle: order, noise, every tensor."""
    source = source_of(data, rank=1, world_size=2, tokens=tokens)
    found = list(updates_from(source, first, 10, num_workers))
    wanted = [source[update] for update in range(first, 10)]
    assert len(found) == len(wanted) == 10 - first
    for a, b in zip(found, wanted, strict=True):
        assert a.rows.tolist() == b.rows.tolist()
        assert a.user_rows.tolist() == b.user_rows.tolist()
        for left, right in zip(a.batches, b.batches, strict=True):
            assert isinstance(left, Batch)
            for one, other in zip(left, right, strict=True):
                assert (one is None and other is None) or torch.equal(one, other)


def test_seed_epoch_and_data_change_the_order(data: PreparedData) -> None:
    rows = [source_of(data, seed=seed)[0].rows.tolist() for seed in (0, 1)]
    per_epoch = source_of(data).plan.updates_per_epoch
    assert rows[0] != rows[1]
    assert source_of(data)[per_epoch].rows.tolist() != rows[0]
    other = UpdatePlan(data.rows("train"), data.rows("train"), BATCH_PAIRS, 0, "other data")
    assert other.update(0, 0).tolist() != rows[0]


@settings(deadline=None, max_examples=300)
@given(
    lengths=st.lists(st.integers(2, 50), min_size=1, max_size=40),
    world_size=st.integers(1, 4),
    pairs=st.integers(1, 10),
    budget=st.integers(1, 200),
)
def test_token_budget(lengths: list[int], world_size: int, pairs: int, budget: int) -> None:
    runs = split_by_tokens(np.asarray(lengths), world_size, pairs, budget)
    assert all(len(step) == world_size for step in runs)
    flat = [run for step in runs for run in step]
    assert np.concatenate(flat).tolist() == list(range(len(lengths)))
    for run in flat:
        cost = len(run) * max((lengths[position] for position in run), default=0)
        assert len(run) <= pairs
        assert cost <= budget or len(run) == 1
    # No more steps than a greedy cut needs: each costs collectives.
    assert (len(runs) - 1) * world_size < greedy_runs(lengths, pairs, budget)


def test_a_pair_beyond_the_budget_lends_it_to_nobody() -> None:
    runs = split_by_tokens(np.asarray([6, 3, 2, 2]), 1, 2, 4)
    assert [run.tolist() for (run,) in runs] == [[0], [1], [2, 3]]


def greedy_runs(lengths: list[int], pairs: int, budget: int) -> int:
    count, current = 1, []
    for length in lengths:
        longer = [*current, length]
        if current and (len(longer) > pairs or len(longer) * max(longer) > budget):
            count, longer = count + 1, [length]
        current = longer
    return count


def test_a_budget_shares_the_work_evenly() -> None:
    """Two long pairs and many short ones: no rank gets both long ones with the rest left to the other."""
    lengths = np.asarray([40, 10, 10, 10, 10, 40])
    (step,) = split_by_tokens(lengths, 2, 10, 120)
    assert [run.tolist() for run in step] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize("encoding", ["joint", "separate"])
@pytest.mark.parametrize("with_prompt", [False, True])
def test_padded_lengths_bound_the_padded_batch(
    data: PreparedData, encoding: Literal["joint", "separate"], with_prompt: bool
) -> None:
    """What the budget counts is at least what a batch holds, and exact for a pair alone."""
    collator = Collator(data, encoding=encoding, with_prompt=with_prompt)
    for row in range(12):
        batch = collator(np.asarray([row]), np.asarray([0]))
        assert padded_lengths(collator, np.asarray([row]))[0] == batch.input_ids.numel()
    rows = np.arange(12)
    assert collator(rows, rows).input_ids.numel() <= 12 * padded_lengths(collator, rows).max()
