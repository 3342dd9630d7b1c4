"""New users: planted tastes come back from a few comparisons, and what is fitted together does not interact."""

import numpy as np
import pytest
import torch

from pal_ds.adapt import LogitPrior, fit_users
from pal_ds.backbones.given import GivenStates
from pal_ds.data.batch import Collator
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import VectorWorld
from pal_ds.data.tables import PreparedData
from pal_ds.heads import PalA
from pal_ds.losses import PreferenceLoss
from pal_ds.model import RewardModel
from pal_ds.users import UserTable

CPU = torch.device("cpu")
SCALE = 4.0


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreparedData, RewardModel]:
    """A head that knows the planted prototypes, so that only users are to be found."""
    source = VectorWorld(
        num_users=30, comparisons_per_user=60, test_comparisons_per_user=20, scale=SCALE, seed=3
    )
    folder = tmp_path_factory.mktemp("adapt") / "data"
    data = prepare(DataConfig(path=str(folder), source=source, split="field"), quiet=True)
    prototypes = torch.tensor(np.asarray(source.prototypes()), dtype=torch.float32)
    head = PalA(
        prototypes.shape[1],
        num_prototypes=len(prototypes),
        user_point="Pw",
        num_layers=1,
        residual=False,
    )
    with torch.no_grad():
        head.prototypes.copy_(SCALE * prototypes)
        head.projector.layers[0].weight.copy_(SCALE * torch.eye(prototypes.shape[1]))
        head.projector.layers[0].bias.zero_()
    return data, RewardModel(GivenStates(), head.requires_grad_(False))


def fit(
    world: tuple[PreparedData, RewardModel], rows: np.ndarray, owners: np.ndarray, num_users: int
) -> torch.Tensor:
    data, model = world
    prior = LogitPrior(torch.zeros(3), 0.1 * torch.eye(3))
    return fit_users(model, PreferenceLoss(), Collator(data), rows, owners, num_users, prior, CPU)


def test_recovers_planted_mixtures(world: tuple[PreparedData, RewardModel]) -> None:
    data, _ = world
    rows = data.rows("train")
    logits = fit(world, rows, data.comparisons["user"][rows], len(data.users))
    found = torch.softmax(logits, 1).numpy()
    planted = np.asarray(
        [-1 if name is None else int(name.rsplit("_", 1)[1]) for name in data.user_group]
    )
    assert (found.argmax(1)[planted >= 0] == planted[planted >= 0]).mean() >= 0.95


def test_users_do_not_interact(world: tuple[PreparedData, RewardModel]) -> None:
    data, _ = world
    rows = data.rows("train")
    users = data.comparisons["user"][rows]
    together = fit(world, rows, users, len(data.users))
    chosen = rows[users == 7]
    alone = fit(world, chosen, np.zeros(len(chosen), np.int64), 1)
    assert torch.softmax(alone[0], 0).numpy() == pytest.approx(
        torch.softmax(together[7], 0).numpy(), abs=2e-3
    )


def test_a_user_without_comparisons_is_the_typical_one(
    world: tuple[PreparedData, RewardModel],
) -> None:
    data, _ = world
    rows = data.rows("train")[:5]
    logits = fit(world, rows, np.zeros(5, np.int64), 2)
    assert logits[1].tolist() == [0.0, 0.0, 0.0]


def test_prior_is_that_of_the_users() -> None:
    generator = torch.Generator().manual_seed(0)
    table = UserTable(3, [f"u{i}" for i in range(2000)])
    table.logits.copy_(
        torch.randn(2000, 3, generator=generator) * torch.tensor([2.0, 1.0, 0.5])
        + torch.tensor([1.0, 0.0, 0.0])
    )
    prior = LogitPrior.of(table)
    assert prior.mean.tolist() == pytest.approx([2 / 3, -1 / 3, -1 / 3], abs=0.1)
    # A shift of all logits is the same mixture, hence costs nothing.
    logits = torch.randn(4, 3, generator=generator)
    assert torch.allclose(prior.penalty(logits), prior.penalty(logits + 5.0), atol=1e-3)


def test_prior_without_users_is_flat_around_zero() -> None:
    prior = LogitPrior.of(UserTable(4))
    assert prior.mean.tolist() == [0.0] * 4
