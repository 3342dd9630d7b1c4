"""The prior of rows in training: its pull is the gradient of its penalty, and EM finds the spread that was planted."""

import numpy as np
import pytest
import torch

from pal_ds.users import RowPrior
from pal_ds.users.row_prior import SCALAR_STD, basis_of, no_basis
from pal_ds.users.rows import RELIABILITY_BETA2, UserRows, width_of

BETA2 = 0.999


@pytest.mark.parametrize("space", ["simplex", "affine", "linear"])
def test_pull_is_the_gradient_of_the_penalty(space: str) -> None:
    draw = torch.Generator().manual_seed(0)
    prior = RowPrior.fresh(np.array([1, 4, 0]), basis_of(3, space), 0.5, "cpu")
    prior.mean = torch.randn(3, generator=draw)
    logits = torch.randn(5, 3, generator=draw, requires_grad=True)
    rows, count = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([1.0, 4.0, 4.0, torch.inf, 1.0])
    away = logits - prior.mean
    if space != "linear":
        away = away - away.mean(1, keepdim=True)
    (away.square().sum(1) / 0.5**2 / 2 / count).sum().backward()
    assert logits.grad is not None
    pull = prior.pull(logits.detach(), rows)
    assert torch.allclose(pull, logits.grad, atol=1e-5)
    assert not pull[3].any(), "a row without comparisons of its own stays where it is"
    shifted = prior.pull(logits.detach() + 2.0, rows)
    assert torch.allclose(shifted, pull, atol=1e-5) == (space != "linear")


def test_reliability_has_a_pull_of_its_own() -> None:
    prior = RowPrior.fresh(np.array([1, 4]), no_basis(3), 0.5, "cpu", scalars=("reliability",))
    values, rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), torch.arange(2)
    pull = prior.pull(values, rows)
    assert not pull[:, :3].any(), "logits without a prior"
    wanted = values[:, 3] / SCALAR_STD**2 / torch.tensor([1.0, 4.0])
    assert torch.allclose(pull[:, 3], wanted)


@pytest.mark.parametrize("variance", [0.1, 1.0])
def test_em_finds_the_spread_of_reliability(variance: float) -> None:
    """Users with looks of variance 1/2 at theirs."""
    draw = torch.Generator().manual_seed(4)
    truth = variance**0.5 * torch.randn(6000, generator=draw)
    looks = truth + 0.5**0.5 * torch.randn(6000, generator=draw)
    prior = RowPrior.fresh(np.ones(6000), no_basis(1), 1.0, "cpu", scalars=("reliability",))
    for _ in range(60):
        rows = UserRows(6000, 1, scalars=("reliability",))
        rows.log_reliability.copy_(looks / (1 + 0.5 / prior.variances["reliability"]))
        rows.step.fill_(10)
        rows.exp_avg_sq[:, 1] = (1 - RELIABILITY_BETA2**10) / 0.5 / 10
        learnt = prior.estimate(rows, 1.0, BETA2)
        assert learnt is not None
        prior.load_state_dict(learnt)
    # The standard error is a hundredth, or three.
    assert prior.variances["reliability"] == pytest.approx(
        variance, abs=0.02 if variance < 1 else 0.08
    )
    with pytest.raises(ValueError, match="no variance of their reliability"):
        prior.load_state_dict({"mean": [0.0], "precision": [[0.0]]})


def shrunk_rows(truth: torch.Tensor, prior: RowPrior, variance: float, seed: int) -> UserRows:
    """Rows at their most likely place after one noisy look at each user's own, as Adam would leave them."""
    num_users, size = truth.shape
    noise = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed))
    looks = (truth + variance**0.5 * noise).double()
    precision = prior.precision.double()
    whole = precision + torch.eye(size) / variance
    likely = torch.linalg.solve(whole, (looks / variance + prior.mean @ prior.precision).T).T
    rows = UserRows(num_users, size)
    rows.records = torch.zeros(num_users, width_of(size))
    rows.logits.copy_(likely)
    rows.step.fill_(10)
    # N B / t of 1: the information of a user is ten times the mean square of the gradients of an update.
    rows.exp_avg_sq.fill_((1 - BETA2**10) / variance / 10)
    return rows


@pytest.mark.parametrize("variance", [0.05, 1.0])
def test_em_finds_the_spread_of_users(variance: float) -> None:
    """Without the posterior's own variance each estimate would be smaller than the one before, down to 0."""
    draw = torch.Generator().manual_seed(1)
    root = torch.tensor([[0.8, 0.0], [0.3, 0.4]])
    mean = torch.tensor([1.0, -0.5])
    truth = mean + torch.randn(4000, 2, generator=draw) @ root.T
    prior = RowPrior.fresh(np.ones(4000), basis_of(2, "linear"), 1.0, "cpu")
    for _ in range(60):
        rows = shrunk_rows(truth, prior, variance, seed=2)
        learnt = prior.estimate(rows, 1.0, BETA2)
        assert learnt is not None
        prior.load_state_dict(learnt)
    assert torch.allclose(prior.mean, mean, atol=0.06)
    covariance = torch.linalg.inv(prior.precision)
    assert torch.allclose(covariance, root @ root.T, atol=0.08)


def test_users_who_are_alike_are_held_together() -> None:
    prior = RowPrior.fresh(np.ones(500), basis_of(3, "simplex"), 1.0, "cpu")
    truth = torch.tensor([0.5, 0.0, -0.5]).expand(500, 3)
    for _ in range(200):
        learnt = prior.estimate(shrunk_rows(truth, prior, 1.0, seed=3), 1.0, BETA2)
        assert learnt is not None
        prior.load_state_dict(learnt)
    spread = torch.linalg.eigvalsh(torch.linalg.pinv(prior.precision))
    # Of 500 users and looks of variance 1 the spread is known to 0.06.
    assert spread.max() < 0.1
    assert torch.allclose(prior.mean, truth[0], atol=0.15)


def test_nothing_is_learnt_of_rows_that_nobody_trained() -> None:
    prior = RowPrior.fresh(np.ones(5), basis_of(2, "linear"), 1.0, "cpu")
    assert prior.estimate(UserRows(5, 2), 1.0, BETA2) is None


def test_a_prior_of_another_k_is_refused() -> None:
    prior = RowPrior.fresh(np.ones(5), basis_of(2, "linear"), 1.0, "cpu")
    other = RowPrior.fresh(np.ones(5), basis_of(3, "linear"), 1.0, "cpu").state_dict()
    with pytest.raises(ValueError, match=r"of shape \(3, 3\), the table has 2 logits"):
        prior.load_state_dict(other)


def test_sample_is_of_users_with_comparisons() -> None:
    count = np.zeros(20_000, np.int64)
    count[::2] = 3
    sample = RowPrior.fresh(count, basis_of(2, "linear"), 1.0, "cpu").sampled
    assert len(sample) == 1024
    assert len(sample.unique()) == 1024
    assert not (sample % 2).any()
    assert sample[-1] == 19_998
