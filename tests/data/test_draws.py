"""Contexts: a user's own comparisons about other prompts, none twice, the same however they are asked for."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pal_ds.data.batch import Batch
from pal_ds.data.collator import Collator
from pal_ds.data.draws import Contexts, Draws, normal_noise
from pal_ds.data.loader import UpdateSource
from pal_ds.data.plan import UpdatePlan
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.heads import HeadOutput, UserState, Vpl
from pal_ds.inference.mixtures import pairs_per_forward, points_in_training
from pal_ds.inference.readers import KnownUsers, with_points
from pal_ds.users import UserTable
from tests.tiny import write_pairs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder = tmp_path_factory.mktemp("contexts")
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 90, num_users=4)))
    options = {"max_length": 80, "vocab_size": 300, "dev_fraction": 0.2, "test_fraction": 0}
    return prepare(DataConfig(path=str(folder / "data"), source=source, **options), quiet=True)


def prompts_of(data: PreparedData, rows: np.ndarray) -> np.ndarray:
    return data.response_prompt[data.comparisons["a"][rows]]


@settings(deadline=None, max_examples=40)
@given(
    num_pairs=st.integers(1, 30),
    epoch=st.integers(0, 3),
    keep=st.lists(st.integers(0, 70), min_size=1, max_size=70, unique=True),
)
@example(num_pairs=4, epoch=0, keep=[*range(71)])
def test_what_is_drawn(data: PreparedData, num_pairs: int, epoch: int, keep: list[int]) -> None:
    """For few and for many comparisons of a user, and for users without any."""
    support = data.rows("train")[[k for k in keep if k < len(data.rows("train"))]]
    contexts = Contexts.of(data, support, seed=1)
    rows = np.arange(len(data.comparisons))
    chosen, length = contexts.draw(rows, epoch, num_pairs)
    user = data.comparisons["user"]
    for row, picked, count in zip(rows, chosen, length, strict=True):
        inside = picked[:count]
        own = support[user[support] == user[row]]
        fit = own[prompts_of(data, own) != prompts_of(data, np.array([row]))]
        assert set(inside) <= set(fit) and len(set(inside)) == count
        # Of few all that fit are found.
        if len(own) <= 4 * num_pairs:
            assert count == min(num_pairs, len(fit))
        assert (picked[count:] == row).all()
    alone, _ = contexts.draw(rows[5:6], epoch, num_pairs)
    assert np.array_equal(alone[0], chosen[5])


def test_epochs_and_seeds_draw_anew(data: PreparedData) -> None:
    rows = data.rows("train")
    one = Contexts.of(data, rows, seed=1)
    first, second = (one.draw(rows, epoch, 3)[0] for epoch in (0, 1))
    other = Contexts.of(data, rows, seed=2).draw(rows, 0, 3)[0]
    assert (first != second).any() and (first != other).any()
    assert np.array_equal(first, one.draw(rows, 0, 3)[0])


def test_every_comparison_of_a_user_is_drawn_as_often(data: PreparedData) -> None:
    rows = data.rows("train")
    rows = rows[data.comparisons["user"][rows] == 0]
    contexts = Contexts.of(data, rows, seed=0)
    drawn = np.concatenate([contexts.draw(rows, epoch, 2)[0].ravel() for epoch in range(400)])
    counts = np.array([(drawn == row).sum() for row in rows])
    # Prompts that many comparisons share are left out more often, never by more than their share.
    share = np.array([(prompts_of(data, rows) == p).sum() for p in prompts_of(data, rows)])
    expected = np.zeros(len(rows))
    for row, own in zip(rows, share, strict=True):
        fit = prompts_of(data, rows) != prompts_of(data, np.array([row]))
        expected[fit] += 400 * 2 / (len(rows) - own)
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected.max())


def test_what_is_known_of_a_user(data: PreparedData) -> None:
    rows = data.rows("train")
    contexts = Contexts.of(data, rows[data.comparisons["user"][rows] != 2], seed=0)
    chosen, length = contexts.known(np.array([0, 2, 3, -1]), 5)
    assert length.tolist() == [5, 0, 5, 0]
    assert (data.comparisons["user"][chosen[0]] == 0).all()
    assert np.array_equal(contexts.known(np.array([3]), 5)[0][0], chosen[2])


def test_a_batch_holds_the_responses_of_its_contexts(data: PreparedData) -> None:
    """The preferred one first; a stand-in or the generic user has none."""
    rows = data.rows("train")[:4]
    collator = Collator(data, contexts=Contexts.of(data, data.rows("train"), 0), generic_row=9)
    draws = Draws(0, 3, frozenset({"normal"}), num_context=2)
    users = np.array([0, 9, 1, 2])
    batch = collator(rows, np.arange(4), draws, users=users)
    assert batch.context is not None and batch.context_length is not None
    chosen, length = collator.contexts.draw(rows, 0, 2)
    assert batch.context_length.tolist() == np.where(users == 9, 0, length).tolist()
    assert batch.user_row.tolist() == users.tolist()
    plain = collator(chosen.ravel(), np.arange(8))
    texts = [
        batch.input_ids[index][batch.attention_mask[index].bool()].tolist()
        for index in batch.context.flatten()
    ]
    preferred_first = preferred_first_in(plain)
    wanted = [
        plain.input_ids[index][plain.attention_mask[index].bool()].tolist()
        for index in preferred_first
    ]
    assert texts == wanted
    assert np.array_equal(batch.normal.numpy(), normal_noise(0, 0, np.arange(4), 3))


def test_comparisons_of_nobody_in_particular_keep_their_group(data: PreparedData) -> None:
    """Records without a user are the generic user's own; what is borrowed from another user loses the group."""
    rows = data.rows("train")[:6]
    owner = int(data.comparisons["user"][rows[0]])
    table = data.comparisons[rows].copy()
    table["group"] = 1
    grouped = replace(data, comparisons=table)
    collator = Collator(grouped, generic_row=owner)
    own = collator(np.arange(6), np.arange(6))
    assert owner in own.user_row and (own.group == 1).all()
    borrowed = collator(np.arange(6), np.arange(6), users=np.full(6, owner))
    assert borrowed.group.tolist() == np.where(own.user_row == owner, 1, -1).tolist()


def test_points_take_no_more_room_than_updates_where_the_backbone_runs(data: PreparedData) -> None:
    """However many users are asked for; who shares a forward does not matter."""
    collator = Collator(data, contexts=Contexts.of(data, data.rows("train"), 0))
    head = Vpl(4, latent_dim=2, width=4, num_context=3, num_context_scored=4)
    sizes = []

    def engine(batch: Batch, user: UserState) -> HeadOutput:
        assert batch.context is not None
        sizes.append(batch.context.shape[0])
        told = batch.input_ids[batch.context].double().sum((1, 2)).float()
        return HeadOutput(told, told, told, None, told[:, :2])

    users, alone = np.array([3, 0, 2]), World(0, 1, torch.device("cpu"))
    most = pairs_per_forward(head, collator, micro_batch_pairs=2)
    points = points_in_training(engine, head, collator, collator, users, alone, most)
    assert sizes == [
        2,
        1,
    ]  # of 4 comparisons each, where an update's forward has 2 and 3 others for each
    one = [
        points_in_training(engine, head, collator, collator, users[[i]], alone) for i in range(3)
    ]
    assert torch.equal(points, torch.cat(one))


@pytest.mark.parametrize("user", ["population", "not met in training"])
def test_no_point_is_made_of_nothing(user: str) -> None:
    """Records without a user tell of nobody, in evaluation as in training."""
    contexts = SimpleNamespace(
        data=SimpleNamespace(users=[user]),
        known=lambda codes, _: (codes[:, None], 0 * codes + (user == "population")),
    )
    restored: Any = SimpleNamespace(
        parts=SimpleNamespace(collator=SimpleNamespace(contexts=contexts)),
        model=SimpleNamespace(head=SimpleNamespace(num_context_scored=1)),
        users=UserTable(2, [user]),
    )
    known = KnownUsers([restored.users.ids], torch.zeros(2, 2))
    data: Any = contexts.data
    assert with_points(known, restored, data, World(0, 1, torch.device("cpu"))) is known


def preferred_first_in(batch: object) -> list[int]:
    """Row of the preferred, then of the rejected response of each comparison of a batch."""
    order = []
    for pair, label in zip(batch.response_index.tolist(), batch.label.tolist(), strict=True):
        order += pair if label < 0 else pair[::-1]
    return order


def test_normal_noise_is_normal() -> None:
    noise = normal_noise(0, 0, np.arange(20000), 5)
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1
    assert np.array_equal(normal_noise(0, 0, np.array([7]), 5)[0], noise[7])


@settings(deadline=None, max_examples=15)
@given(
    fraction=st.sampled_from([0.0, 0.3, 1.0]),
    world_size=st.integers(1, 3),
    update=st.integers(0, 3),
)
def test_the_generic_user_is_trained_beside(
    data: PreparedData, fraction: float, world_size: int, update: int
) -> None:
    rows = data.rows("train")
    plan = UpdatePlan(rows, rows, 13, 0, data.hash)
    sources = [
        UpdateSource(plan, Collator(data, generic_row=4), rank, world_size, 4, None, None, fraction)
        for rank in range(world_size)
    ]
    parts = [source[update] for source in sources]
    own, epoch_rows = parts[0], plan.update(0, update)
    generic = own.user_rows == 4
    assert np.array_equal(own.rows[~generic], epoch_rows)
    assert np.array_equal(own.user_rows[~generic], data.comparisons["user"][epoch_rows])
    # Each copy stands right behind its comparison.
    assert np.array_equal(own.rows[generic], own.rows[np.flatnonzero(generic) - 1])
    assert generic.sum() == {0.0: 0, 1.0: len(epoch_rows)}.get(fraction, generic.sum())
    seen = {}
    for part in parts:
        assert np.array_equal(part.rows, own.rows) and np.array_equal(part.user_rows, own.user_rows)
        for batch in part.batches:
            real = batch.weight > 0
            seen |= dict(
                zip(batch.position[real].tolist(), batch.user_row[real].tolist(), strict=True)
            )
    assert [seen[place] for place in range(len(own.rows))] == own.user_rows.tolist()
