"""New users: planted tastes come back from a few comparisons, and what is fitted together does not interact."""

from typing import Any

import numpy as np
import pytest
import torch

from pal_ds.adaptation import gradient, result
from pal_ds.adaptation.blocks import UserComparisons
from pal_ds.adaptation.fit import UserPairs, fit_users
from pal_ds.adaptation.gradient import margins_of
from pal_ds.adaptation.left_out import right_where_left_out
from pal_ds.adaptation.new_users import few_per_user
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.backbones.given import GivenStates
from pal_ds.data.batch import Batch
from pal_ds.data.collator import Collator
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import VectorWorld
from pal_ds.data.tables import PreparedData
from pal_ds.errors import UserError
from pal_ds.heads import Features, PalA, PalB, UserState
from pal_ds.heads.pal_a import Similarity
from pal_ds.losses import PairFacts, PreferenceLoss, TokenWeighting
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
    prior = LogitPrior.gaussian(torch.zeros(3), 0.1 * torch.eye(3))
    pairs = UserPairs(rows, owners, num_users)
    return fit_users(model, Collator(data), pairs, loss=PreferenceLoss(), prior=prior).logits


def test_recovers_planted_mixtures(world: tuple[PreparedData, RewardModel]) -> None:
    data, _ = world
    rows = data.rows("train")
    logits = fit(world, rows, data.comparisons["user"][rows], len(data.users))
    found = torch.softmax(logits, 1).numpy()
    planted = np.asarray(
        [-1 if name is None else int(name.rsplit("_", 1)[1]) for name in data.user_group]
    )
    assert (found.argmax(1)[planted >= 0] == planted[planted >= 0]).mean() >= 0.95


@pytest.mark.parametrize("weighting", ["last", "mean"])
def test_newton_and_adam_minimise_the_same(
    world: tuple[PreparedData, RewardModel], weighting: TokenWeighting
) -> None:
    data, model = world
    rows = few_per_user(data, data.rows("train"), 10, 0)
    owners, prior = (
        data.comparisons["user"][rows],
        LogitPrior.gaussian(torch.zeros(3), 0.1 * torch.eye(3)),
    )
    loss, table = PreferenceLoss(token_weighting=weighting), data.comparisons[rows]
    features = model.backbone(Collator(data)(rows, np.arange(len(rows))))

    def objective(logits: torch.Tensor) -> torch.Tensor:
        margin = model.head(features, UserState(logits[owners])).margin[:, 0]
        each = -torch.nn.functional.logsigmoid(torch.from_numpy(table["label"]) * margin)
        likelihood = torch.zeros(len(logits)).index_add(0, torch.from_numpy(owners), each)
        return likelihood + prior.penalty(logits, torch.zeros(len(logits), dtype=torch.int64))

    newton, adam = (
        fit_users(
            model,
            Collator(data),
            UserPairs(rows, owners, len(data.users)),
            loss=loss,
            prior=prior,
            solver=solver,
        ).logits
        for solver in ("newton", "adam")
    )
    gap = objective(adam) - objective(newton)
    assert gap.min() >= -1e-4 and gap.median() <= 1e-3
    assert (objective(newton) < objective(torch.zeros_like(newton))).all()


@pytest.mark.parametrize("similarity", ["distance", "cosine"])
def test_margins_by_points_are_those_of_the_head(similarity: Similarity) -> None:
    """Windows of three positions, two starts, users of one and two comparisons."""
    torch.manual_seed(0)
    head = PalA(6, 3, 5, 2, similarity=similarity)
    features = Features(torch.randn(4, 3, 6), torch.tensor([[0, 1], [2, 3], [1, 2]]))
    owner, rows = torch.tensor([0, 1, 1]), torch.tensor([2, 0])
    logits = torch.randn(2, 2, 3, requires_grad=True)
    by_points = margins_of(head, features, None, owner)
    assert by_points.__qualname__.startswith("_by_points")
    by_head = gradient._by_head(head, features, owner)
    found, expected = by_points(logits, rows), by_head(logits, rows)
    assert found.shape == (2, 2, 3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradients = [
        torch.autograd.grad(m.square().sum(), logits, retain_graph=True)[0]
        for m in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_the_reference_optimiser_is_adamw_stopped_early(
    world: tuple[PreparedData, RewardModel],
) -> None:
    """One comparison per user leaves no order to draw: 20 steps of torch's AdamW on each user alone."""
    data, model = world
    rows = few_per_user(data, data.rows("train"), 1, 0)
    owners = data.comparisons["user"][rows]
    begin = torch.randn(len(data.users), 3, generator=torch.Generator().manual_seed(0))
    prior = LogitPrior.gaussian(torch.zeros(3), torch.eye(3))
    found = fit_users(
        model,
        Collator(data),
        UserPairs(rows, owners, len(begin)),
        loss=PreferenceLoss(),
        prior=prior,
        solver="reference",
        initial=begin,
    ).logits
    for row, user in list(zip(rows, owners, strict=True))[:3]:
        batch = Collator(data)(rows[rows == row], np.zeros(1))
        logits = begin[user : user + 1].clone().requires_grad_()
        optimizer = torch.optim.AdamW([logits], lr=5e-3, weight_decay=0.0)
        for _ in range(20):
            margin = model.head(model.backbone(batch), UserState(logits)).margin
            optimizer.zero_grad()
            (-torch.nn.functional.logsigmoid(batch.label * margin[0, 0])).sum().backward()
            optimizer.step()
        torch.testing.assert_close(found[user], logits[0].detach(), atol=1e-4, rtol=0)
        assert (found[user] - begin[user]).abs().max() > 0.01


def test_the_reference_optimiser_orders_a_user_alone() -> None:
    """A neighbour with more comparisons moves no draw of any epoch."""
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(13, 3, generator=generator)
    owner = torch.tensor([0] * 4 + [1] * 9)

    def fitted(num_pairs: int) -> torch.Tensor:
        def margins(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
            mixture = torch.softmax(logits, -1)[:, owner[rows]]
            return (mixture * slopes[rows]).sum(-1, keepdim=True)

        zeros = torch.zeros(num_pairs, dtype=torch.int64)
        required, weight = torch.zeros(2, num_pairs)
        facts = PairFacts(zeros + 1, zeros, zeros + 1, required, weight + 1)
        comparisons = UserComparisons(owner[:num_pairs], facts)
        losses = gradient.losses_of(margins, PreferenceLoss(), comparisons)
        return gradient.reference_adamw(losses, comparisons.user, torch.zeros(2, 3))[0]

    torch.testing.assert_close(fitted(4), fitted(13), rtol=0, atol=1e-6)


def test_newton_is_refused_where_a_head_gives_no_statistics(
    world: tuple[PreparedData, RewardModel],
) -> None:
    data, _ = world
    model = RewardModel(GivenStates(), PalA(data.info["vector_size"], 3, num_layers=2))
    rows, owner = data.rows("train")[:4], np.zeros(4, np.int64)
    prior = LogitPrior.gaussian(torch.zeros(3), torch.eye(3))
    arguments = (model, Collator(data), UserPairs(rows, owner, 1))
    options = {"loss": PreferenceLoss(), "prior": prior}
    with pytest.raises(UserError, match="--solver newton: this run's head gives no statistics"):
        fit_users(*arguments, **options, solver="newton")
    assert fit_users(*arguments, **options).logits.isfinite().all()


def test_users_do_not_interact(world: tuple[PreparedData, RewardModel]) -> None:
    data, _ = world
    rows = data.rows("train")
    users = data.comparisons["user"][rows]
    together = fit(world, rows, users, len(data.users))
    chosen = rows[users == 7]
    alone = fit(world, chosen, np.zeros(len(chosen), np.int64), 1)
    assert torch.softmax(alone[0], 0).numpy() == pytest.approx(
        torch.softmax(together[7], 0).numpy(), abs=1e-3
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
    everybody = torch.zeros(4, dtype=torch.int64)
    shifted = prior.penalty(logits + 5.0, everybody)
    assert torch.allclose(prior.penalty(logits, everybody), shifted, atol=1e-3)


def test_prior_without_users_is_flat_around_zero() -> None:
    prior = LogitPrior.of(UserTable(4))
    assert prior.mean.tolist() == [0.0] * 4


def test_the_prior_is_centred_on_the_generic_user() -> None:
    """Who is what users get at zero comparisons; the others tell how far users lie from there."""
    table = UserTable(3, ["ann", "population", "bob"])
    table.logits.copy_(torch.tensor([[4.0, 0.0, -4.0], [1.0, 1.0, -2.0], [4.0, 2.0, -6.0]]))
    prior = LogitPrior.of(table)
    torch.testing.assert_close(prior.mean, torch.tensor([1.0, 1.0, -2.0]))
    others = UserTable(3, ["ann", "bob"])
    others.logits.copy_(table.logits[[0, 2]])
    assert not torch.allclose(LogitPrior.of(others).mean, prior.mean)
    alone = UserTable(3, ["population"])
    alone.logits.copy_(table.logits[1:2])
    torch.testing.assert_close(LogitPrior.of(alone).mean, prior.mean)


def test_users_whom_a_fit_fails_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Ten planted failures, and one user with whom all is well."""
    fine: result.AdaptedUser = {
        "pairs": 8,
        "accuracy_on_these_pairs": 0.8,
        "accuracy_before": 0.7,
        "accuracy_left_out": 0.75,
        "mixture": [0.5, 0.3, 0.2],
        "margin_std": 0.4,
        "margin_std_before": 1.0,
    }
    changes: dict[str, dict[str, Any]] = {
        "worse 1": {"accuracy_on_these_pairs": 0.5, "accuracy_left_out": 0.75},
        "worse 2": {"accuracy_before": 0.9},
        "left out 1": {"accuracy_left_out": 0.6},
        "left out 2": {"accuracy_left_out": 0.0},
        "border 1": {"mixture": [0.995, 0.005, 0.0]},
        "border 2": {"mixture": [0.0, 0.0, 1.0]},
        "unmoved 1": {"margin_std": 0.95},
        "unmoved 2": {"margin_std": 1.2},
        "both 1": {"accuracy_left_out": 0.3, "margin_std": 1.0},
        "both 2": {"accuracy_before": 1.0, "mixture": [1.0, 0.0, 0.0]},
    }
    for name, changed in changes.items():
        caplog.clear()
        failed: Any = {**fine, **changed}
        result.warn_of_fits({"ann": fine, name: failed}, on_simplex=True)
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == (2 if name.startswith("both") else 1)
        assert all("1 of 2 users" in one and f"({name!r}" in one for one in said)
    caplog.clear()
    result.warn_of_fits({"ann": fine}, on_simplex=True)
    # Points of any sign have no border.
    result.warn_of_fits({"ann": {**fine, "mixture": [-1.0, 2.0]}}, on_simplex=False)
    assert not caplog.text
    del fine["accuracy_left_out"], fine["margin_std_before"]  # fits without a posterior
    result.warn_of_fits({"ann": fine, "bob": {**fine, "accuracy_before": 0.9}}, on_simplex=True)
    assert "1 of 2 users are served worse" in caplog.text


def test_what_is_left_out_is_that_of_fits_without_it(
    world: tuple[PreparedData, RewardModel],
) -> None:
    """Six comparisons of each of 20 users in five parts, against users of their own who lack one part."""
    data, model = world
    collator = Collator(data)
    table = data.comparisons
    rows = np.concatenate([np.flatnonzero(table["user"] == user)[:6] for user in range(20)])
    owners = np.repeat(np.arange(20), 6)
    assert (np.diff(data.response_prompt[table["a"][rows]].reshape(20, 6)) != 0).all()
    prior = LogitPrior.gaussian(torch.zeros(3), 0.3 * torch.eye(3))
    loss = PreferenceLoss()
    mixed = np.random.default_rng(0).permutation(120)  # a caller may give them in any order
    pairs = UserPairs(rows[mixed], owners[mixed], 20)
    initial = torch.zeros(20, 3)
    right = right_where_left_out(
        model, collator, pairs, loss=loss, prior=prior, solver="auto", initial=initial
    )
    part = np.tile([0, 1, 2, 3, 4, 0], 20)
    others = (part[:, None] != part) & (owners[:, None] == owners)
    apart = UserPairs(
        np.concatenate([rows[some] for some in others]),
        np.repeat(np.arange(120), others.sum(1)),
        120,
    )
    logits = fit_users(model, collator, apart, loss=loss, prior=prior).logits
    batch = collator(rows, np.arange(120))
    user = UserState(None, None, torch.softmax(logits / model.head.temperature, 1))
    margins = model(batch, user).margin[:, -1].detach().numpy()
    exact = np.bincount(owners, margins * batch.label.numpy() > 0, 20)
    np.testing.assert_array_equal(right, exact)
    assert right.sum() < 120


class OwnPrompts(GivenStates):
    """Each response stands for its prompt, too."""

    def forward(self, batch: Batch) -> Features:
        features = super().forward(batch)
        shown = batch.response_index
        return features._replace(prompt=features.response, prompt_index=shown)


def test_a_fit_sees_every_prompt(world: tuple[PreparedData, RewardModel]) -> None:
    """`prompt_dropout` hides prompts in training alone: with it fits are those without it, to the bit."""
    data, _ = world
    rows = np.arange(20)
    fitted = []
    for dropout in (0.5, 0.5, 0.0):
        torch.manual_seed(0)
        head = PalB(data.response_vectors.shape[1], 3, num_layers=1, prompt_dropout=dropout)
        model = RewardModel(OwnPrompts(), head)
        prior = LogitPrior.gaussian(torch.zeros(3), 0.1 * torch.eye(3))
        pairs = UserPairs(rows, rows % 4, 4)
        loss = PreferenceLoss()
        fitted.append(fit_users(model, Collator(data), pairs, loss=loss, prior=prior).logits)
    assert torch.equal(fitted[0], fitted[1]) and torch.equal(fitted[0], fitted[2])
