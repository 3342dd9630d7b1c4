"""The vector world keeps its promises: counts, known truth, pure users, realisable choices."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from pal_ds.data.sources.vector_world import VectorWorld
from pal_ds.errors import UserError


@pytest.fixture(scope="module")
def world() -> VectorWorld:
    return VectorWorld(num_users=24, seed=3)


@pytest.fixture(scope="module")
def records(world):
    return list(world.records())


def test_counts_and_the_vector_path(world, records):
    assert len(records) == world.num_records() == 24 * (800 + 20 + 100)
    for split, per_user in (("train", 800), ("dev", 20), ("test", 100)):
        users = [record.user_id for record in records if record.split == split]
        assert {users.count(user) for user in world.mixtures()} == {per_user}
    for record in records[:100]:
        assert record.prompt is None and record.responses is None
        assert [len(row) for row in record.response_features] == [8, 8]
        assert record.seen is True and record.label in (-1, 1)


def test_no_vector_is_in_two_splits(records):
    rows = [row for record in records for row in record.response_features]
    assert len(set(rows)) == len(rows)


def test_same_seed_same_records():
    settings = {"num_users": 4, "comparisons_per_user": 10}
    first, second = VectorWorld(**settings, seed=1), VectorWorld(**settings, seed=1)
    assert list(first.records()) == list(first.records()) == list(second.records())
    assert first.describe() == second.describe()
    assert list(first.records()) != list(VectorWorld(**settings, seed=2).records())


def test_pure_users_are_many_named_and_spread(world, records):
    groups = {record.user_id: record.group for record in records}
    pure = {user: group for user, group in groups.items() if group is not None}
    assert len(pure) >= 0.3 * len(groups)
    assert set(pure.values()) == {f"prototype_{k}" for k in range(3)}
    for user, group in pure.items():
        assert world.mixtures()[user][int(group.removeprefix("prototype_"))] == 1.0
    assert all(sum(row) == pytest.approx(1.0) for row in world.mixtures().values())


def test_choices_follow_the_known_probabilities(records):
    probability = np.array([record.probability for record in records])
    label = np.array([record.label for record in records])
    assert np.maximum(probability, 1 - probability).mean() == pytest.approx(0.9, abs=1e-3)
    assert ((probability > 0.5) == (label > 0)).mean() == pytest.approx(0.9, abs=0.01)
    assert ((label > 0) - probability).mean() == pytest.approx(0.0, abs=0.01)


def test_probability_is_that_of_an_ideal_point(world, records):
    scale, prototypes = world.describe()["choice_scale"], world.prototypes()
    for record in records[:50]:
        point = np.array(world.mixtures()[record.user_id]) @ prototypes
        first, second = np.linalg.norm(np.array(record.response_features) - point, axis=1)
        margin = scale * (first - second)
        assert record.probability == pytest.approx(1 / (1 + np.exp(-margin)), abs=1e-9)


def test_prompt_conditioned_kind():
    world = VectorWorld(num_users=3, comparisons_per_user=10, kind="pal_b", scale=5.0)
    record = next(world.records())
    matrix = np.einsum("k,kij->ij", world.mixtures()[record.user_id], world.prototypes())
    wanted = matrix @ np.array(record.prompt_features)
    features = np.array(record.response_features)
    cosines = features @ wanted / np.linalg.norm(features, axis=1) / np.linalg.norm(wanted)
    margin = 5.0 * (cosines[1] - cosines[0])
    assert record.probability == pytest.approx(1 / (1 + np.exp(-margin)), abs=1e-9)


def test_a_plain_prototype_model_reaches_the_truth(world, records):
    margins, rows = _fit(world, records)
    truth = np.array([records[i].probability for i in rows])
    mixed = np.array([records[i].group is None for i in rows])
    expected = np.where(margins > 0, truth, 1 - truth).mean()
    assert expected >= 0.98 * np.maximum(truth, 1 - truth).mean()
    assert np.abs(1 / (1 + np.exp(-margins)) - truth)[mixed].mean() <= 0.03


def _fit(world: VectorWorld, records: list) -> tuple[np.ndarray, np.ndarray]:
    """Prototypes, a linear projector and logits by Adam; margins on the test split and its rows."""
    torch.manual_seed(0)
    features = torch.tensor([record.response_features for record in records])
    labels = torch.tensor([float(record.label) for record in records])
    users = torch.tensor([int(record.user_id.removeprefix("user_")) for record in records])
    projector = torch.nn.Linear(8, 8)
    prototypes = torch.nn.Parameter(torch.randn(3, 8))
    logits = torch.nn.Parameter(torch.randn(world.num_users, 3))
    shared = [*projector.parameters(), prototypes]
    adam = torch.optim.Adam([{"params": shared, "lr": 3e-2}, {"params": [logits], "lr": 1e-1}])
    num_updates, splits = 600, np.array([record.split for record in records])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, num_updates)
    train = torch.from_numpy(np.flatnonzero(splits == "train"))

    def margin(rows: torch.Tensor) -> torch.Tensor:
        points = projector(logits[users[rows]].softmax(-1) @ prototypes)
        distances = (projector(features[rows]) - points[:, None]).norm(dim=-1)
        return distances[:, 0] - distances[:, 1]

    for _ in range(num_updates):
        rows = train[torch.randint(len(train), (512,))]
        loss = functional.softplus(-labels[rows] * margin(rows)).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        schedule.step()
    test = np.flatnonzero(splits == "test")
    with torch.no_grad():
        return margin(torch.from_numpy(test)).double().numpy(), test


@pytest.mark.parametrize(
    "wrong",
    [{"num_users": 0}, {"pure_fraction": 1.5}, {"bayes_accuracy": 1.0}, {"kind": "pal_c"}],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        VectorWorld(**wrong)
