"""A threshold of ties per user: its gradient, and undecided users of a planted world, who are found out."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.eval.evaluate import evaluate_run
from pal_ds.eval.results import split_request
from pal_ds.heads.base import HeadOutput, UserState
from pal_ds.inference.load_run import restore
from pal_ds.inference.mixtures import list_users
from pal_ds.losses import PreferenceLoss
from pal_ds.model import RewardModel
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.tie_models import TieThreshold
from pal_ds.users import UsersConfig, UserTable
from tests.spawn import outcome_of
from tests.users import planted
from tests.users.planted import prepared

ALONE = World(0, 1, torch.device("cpu"))
TASTE = np.array([1.5, -1.0, 0.5, 0.0])
NUM_USERS, NUM_PAIRS = 40, 50
THRESHOLDS = 0.2, 4.0
"""Davidson's, of decided and of undecided users."""


class MarginsAsGiven(nn.Module):
    """Stands in for backbone and head: the batch is the margins [B, T] themselves."""

    def forward(self, margin: torch.Tensor, *_: object) -> HeadOutput:
        return HeadOutput(margin, margin, margin.new_zeros(len(margin)))


@pytest.mark.parametrize("ties", ["davidson", "rao_kupper"])
def test_gradient_against_autograd_in_fp64(ties: str) -> None:
    """Of the loss in each user's log factor, against the formulas of the papers written out."""
    draw = torch.Generator().manual_seed(0)
    margin, label = torch.randn(9, 1, generator=draw), torch.tensor([0, 1, -1] * 3)
    q = torch.randn(9, generator=draw)
    own = q.clone().requires_grad_()
    given = MarginsAsGiven()
    model = RewardModel(nn.Identity(), given, tie_threshold=TieThreshold(0.7))  # pyright: ignore[reportArgumentType]
    model._scored = lambda batch, user, pair_loss: given(batch)  # pyright: ignore[reportAttributeAccessIssue]
    output = model.train()(margin, UserState(log_tie_threshold=own))
    loss = PreferenceLoss(ties=ties)  # pyright: ignore[reportArgumentType]
    window = torch.zeros(9, dtype=torch.int64), torch.ones(9, dtype=torch.int64)
    loss(output.margin, label, *window, threshold=output.threshold).sum().backward()

    exact, of_run = q.double().requires_grad_(), torch.tensor(0.7).double().log().requires_grad_()
    t, m = (of_run + exact).exp(), margin[:, 0].double()
    if ties == "davidson":
        parts = torch.stack([(-m / 2).exp(), t, (m / 2).exp()])
        chances = parts / parts.sum(0)
    else:
        first, second = torch.sigmoid(-m - t), torch.sigmoid(m - t)
        chances = torch.stack([first, 1 - first - second, second])
    (-chances.gather(0, label[None] + 1).log()).sum().backward()
    assert own.grad is not None and exact.grad is not None and of_run.grad is not None
    torch.testing.assert_close(own.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert model.tie_threshold is not None
    learnt = model.tie_threshold.log_threshold.grad
    assert learnt is not None
    torch.testing.assert_close(learnt[0].double(), of_run.grad, rtol=1e-4, atol=1e-5)


def is_undecided(user: str) -> bool:
    return int(user.removeprefix("u")) % 2 == 0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    """Pairs of vectors that users of one taste compare; every other one is often undecided."""
    folder = tmp_path_factory.mktemp("ties")
    generator = np.random.default_rng(0)
    with open(folder / "pairs.jsonl", "w") as stream:
        for index in range(NUM_USERS * NUM_PAIRS):
            pair = generator.normal(size=(2, 4)).round(4)
            user, lead = f"u{index % NUM_USERS}", float((pair[1] - pair[0]) @ TASTE)
            weights = [math.exp(-lead / 2), THRESHOLDS[is_undecided(user)], math.exp(lead / 2)]
            y = int(generator.choice([-1, 0, 1], p=np.array(weights) / sum(weights)))
            row = {"user_id": user, "response_features": pair.tolist(), "y": y}
            stream.write(json.dumps(row) + "\n")
    return prepared(folder / "pairs.jsonl")


def trained(data: PreparedData, name: str, *words: str, epochs: int = 16) -> RunDirectory:
    return planted.trained(data, name, "--loss.ties=davidson", *words, epochs=epochs)


def test_undecided_users_are_found_out(data: PreparedData) -> None:
    head, learnt = "--head=BradleyTerry", "--users.tie_threshold=learnt"
    plain, run = (trained(data, "plain", head), trained(data, "own", head, learnt))
    users = restore(run).users
    assert users.scalars == ("tie_threshold",) and not restore(plain).users.scalars
    undecided = torch.tensor([is_undecided(user) for user in users.ids])
    q = users.log_tie_threshold
    assert q[undecided].min() > q[~undecided].max(), "users are in order"
    # The planted distance is log 20 = 3.0, of which a prior with a spread of 0.5 leaves about a half.
    assert q[undecided].mean() - q[~undecided].mean() > 1.2
    without, with_it = (evaluate_run(one, ALONE) for one in (plain, run))
    assert "ties" in without and "ties" in with_it
    before, after = without["ties"]["log_loss"], with_it["ties"]["log_loss"]
    assert before is not None and after is not None and after < before - 0.05
    assert with_it["accuracy"] is not None and without["accuracy"] is not None
    assert with_it["accuracy"] > without["accuracy"] - 0.03
    factors = [line.get("tie_threshold") for line in list_users(run)]
    assert factors == pytest.approx(q.exp().tolist())


def test_beside_reliability_and_a_prior(data: PreparedData, tmp_path: Path) -> None:
    """Columns lie behind each other; both spreads are learnt; new users have the run's threshold, and adapt says so."""
    words = ["--head=Lore", "--head.num_prototypes=2", "--users.prior=learnt"]
    words += ["--users.reliability=learnt", "--users.tie_threshold=learnt"]
    run = trained(data, "both", *words)
    restored = restore(run)
    users, learnt = restored.users, restored.manifest["users_prior"]
    assert users.scalars == ("reliability", "tie_threshold") and learnt is not None
    undecided = torch.tensor([is_undecided(user) for user in users.ids])
    gap = users.log_tie_threshold[undecided].mean() - users.log_tie_threshold[~undecided].mean()
    assert gap > 1.5
    assert "reliability_variance" in learnt and "tie_threshold_variance" in learnt
    assert learnt["tie_threshold_variance"] > 0.6 > learnt["reliability_variance"]
    adapt = ["adapt", f"--run_dir={run.path}", f"--out={tmp_path / 'new'}"]
    ((code, words_of_adapt),) = outcome_of("pal_ds", *adapt)
    assert code == 0 and "own threshold of ties is not fitted" in words_of_adapt
    table = UserTable.load(tmp_path / "new")
    assert table.scalars == users.scalars and not table.log_tie_threshold.any()
    request = split_request("unseen_test")
    known = evaluate_run(run, ALONE, request=request, users=tmp_path / "new")
    assert known["adapted_users"] and known.get("ties") is not None


def test_a_resumed_run_ends_in_the_same_bits(data: PreparedData) -> None:
    words = ["--head=BradleyTerry", "--users.prior=learnt", "--users.tie_threshold=learnt"]
    words += ["--train.save_every=7"]
    whole = trained(data, "whole", *words, epochs=2)
    trained(data, "stopped", *words, "--train.stop_after=13", epochs=2)
    resumed = trained(data, "stopped", *words, epochs=2)
    ends = [restore(run) for run in (whole, resumed)]
    first, second = (end.users.state_dict() for end in ends)
    assert first["log_tie_threshold"].any() and first.keys() == second.keys()
    for name in ("log_tie_threshold", "exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(first[name], second[name]), name
    assert ends[0].manifest["users_prior"] == ends[1].manifest["users_prior"]


@pytest.mark.parametrize("ties", ["half", "drop"])
def test_it_is_refused_where_ties_have_no_threshold(
    data: PreparedData, tmp_path: Path, ties: str
) -> None:
    words = [f"--run_dir={tmp_path}", f"--data.path={data.path}", "--head=BradleyTerry"]
    words += ["--users.tie_threshold=learnt", f"--loss.ties={ties}"]
    ((code, said),) = outcome_of("pal_ds", "train", *words)
    assert code == 2 and f"users.tie_threshold: learnt, and loss.ties is {ties}" in said


def test_tables_that_disagree_are_refused(tmp_path: Path) -> None:
    config = UsersConfig(tie_threshold="learnt", reliability="learnt")
    table = UserTable(2, ["a", "b"], config)
    table.log_tie_threshold[0], table.log_reliability[1] = 0.5, -0.5
    table.save(tmp_path / "both")
    again = UserTable.load(tmp_path / "both")
    assert again.log_tie_threshold.tolist() == [0.5, 0.0]
    assert again.log_reliability.tolist() == [0.0, -0.5]
    rule = r"a tie threshold, and users\.tie_threshold is none"
    with pytest.raises(UserError, match=rule):
        UserTable.load(tmp_path / "both", replace(config, tie_threshold="none"))
