"""The posterior of users' points: it is that of a fine grid, and its intervals hold what they promise."""

import pytest
import torch
from torch import Tensor

from pal_ds.adaptation.blocks import UserComparisons, blocks
from pal_ds.adaptation.gradient import losses_of, margins_of
from pal_ds.adaptation.likelihoods import ByLosses, ByStatistics
from pal_ds.adaptation.newton import solve
from pal_ds.adaptation.objective import shape_of
from pal_ds.adaptation.posterior import NUM_DRAWS, Posterior, Simplex, posterior_of
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.adaptation.user_posteriors import posteriors_by_statistics
from pal_ds.heads.sufficient_statistics import MixtureStatistics
from pal_ds.losses import PairFacts, PreferenceLoss
from pal_ds.users import UserTable
from tests.adaptation.test_newton import (
    COUNTS,
    KINDS,
    Case,
    case,
    fit,
    grid,
    head_of,
    objective,
    prior_of,
)

LOSS = PreferenceLoss("logistic", "cumulative")
USERS = range(1, len(COUNTS))
"""Those who have comparisons."""


def posterior(case: Case, logits: Tensor, prior: LogitPrior, loss: PreferenceLoss) -> Posterior:
    """Of the users with comparisons, by row."""
    parts = posteriors_by_statistics(*case, logits, prior, loss)
    width = logits.shape[1]
    whole = Posterior(
        logits.new_zeros(len(logits), width, width),
        torch.zeros_like(logits),
        logits.new_zeros(len(logits)),
    )
    for users, own in parts:
        for everyone, some in zip(whole, own, strict=True):
            everyone[users] = some
    return whole


def moments(log_density: Tensor, places: Tensor, fitted: Tensor, tau: float) -> Tensor:
    """Second moment of the points of a grid about the fitted point, fp64."""
    weight = torch.softmax(log_density, 0)
    away = torch.softmax(places.double() / tau, 1) - torch.softmax(fitted.double() / tau, 0)
    return (weight[:, None] * away).T @ away


@pytest.mark.parametrize(
    ("kind", "num_prototypes", "num_positions"),
    [(kind, *shape) for kind in KINDS for shape in ((2, 7), (3, 1))],
)
def test_it_is_that_of_a_grid(kind: str, num_prototypes: int, num_positions: int) -> None:
    problem = case(kind, num_prototypes, num_positions)
    logits, places = fit(problem), grid(num_prototypes)
    own = posterior(problem, logits, prior_of(num_prototypes), LOSS)
    tau = problem[0].temperature
    for user in USERS:
        density = -objective(problem, places, user)
        exact = moments(density, places, logits[user], tau)
        error = (own.covariance[user] - exact).norm() / exact.norm()
        # About 70 draws count, so a second moment errs by a tenth, by a quarter where fewer do.
        assert error < 0.3, (user, float(error))
        assert NUM_DRAWS / 4 < own.effective_draws[user] <= 2 * NUM_DRAWS


def test_a_prior_with_clusters_is_kept() -> None:
    """One comparison leaves two clusters likely: the point lies in either, and the posterior says so."""
    means = torch.tensor([[0.0, 0.0], [3.0, -3.0], [-3.0, 3.0]])
    precision = torch.eye(2) * 4 - 1.75 + 0.25
    precisions = torch.stack([0.3 * torch.eye(2) + 0.35, precision])
    prior = LogitPrior(means, precisions, torch.tensor([-3.0, 0.7, 0.6]))
    problem = case("cosine", 2, counts=(1, 3))
    loss = PreferenceLoss("logistic", "last")
    logits = solve(*problem, 2, prior, loss)
    own = posterior(problem, logits, prior, loss)
    places = grid(2)
    single, tau = prior_of(2), problem[0].temperature
    of_single = single.penalty(places, torch.zeros(len(places), dtype=torch.int64)).double()
    each = [prior.penalty(places, torch.full((len(places),), c)) for c in range(3)]
    cost = -torch.logsumexp(-torch.stack(each).double(), 0)
    assert own.covariance[0, 0, 0] > 0.3**2
    for user in range(2):
        density = -(objective(problem, places, user) - of_single + cost)
        exact = moments(density, places, logits[user], tau)
        assert (own.covariance[user] - exact).norm() < 0.15 * exact.norm()


def by_losses(problem: Case) -> ByLosses:
    statistics, comparisons = problem
    owner = comparisons.user
    margins = margins_of(head_of("cosine", 3), None, statistics, owner)  # type: ignore[arg-type]
    return ByLosses(losses_of(margins, LOSS, comparisons), owner)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_positions", [1, 7])
def test_losses_and_statistics_say_the_same(kind: str, num_positions: int) -> None:
    problem = statistics, comparisons = case(kind, 3, num_positions)
    places = torch.randn(len(COUNTS), 5, 3, generator=torch.Generator().manual_seed(0))
    point = torch.softmax(places / statistics.temperature, -1)
    value = by_losses(problem).log_value(places, point)
    for block in blocks(statistics, comparisons, len(COUNTS), "cumulative"):
        own = ByStatistics(block, statistics, shape_of(LOSS, None), prior_of(3))
        users = block.users
        torch.testing.assert_close(
            own.log_value(places[users], point[users]), value[users], atol=1e-4, rtol=1e-4
        )


def test_the_curvature_of_losses_is_their_hessian() -> None:
    problem = case("prompts", 3)
    places = torch.randn(len(COUNTS), 3, generator=torch.Generator().manual_seed(0))
    places -= places.mean(1, keepdim=True)
    curvature = by_losses(problem).curvature(places)
    prior = prior_of(3).precisions[0].double()
    for user in USERS:

        def of_user(logits: Tensor, user: int = user) -> Tensor:
            return objective(problem, logits[None], user)[0]

        exact = torch.autograd.functional.hessian(of_user, places[user].double())
        exact = exact - (prior - 1 / 3)  # the objective centres its logits
        torch.testing.assert_close(curvature[user].double(), exact, atol=0.05, rtol=0.05)


def planted(num_users: int, num_comparisons: int) -> tuple[float, float]:
    """(coverage of 90% intervals of the true margin, root mean square of error over standard deviation)."""
    width, hidden, draw = 4, 8, torch.Generator().manual_seed(num_comparisons)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    population = torch.diag(torch.tensor([1.5, 1.0, 1.0, 0.5]))
    seen = UserTable(width, [f"seen {number}" for number in range(500)])
    seen.logits.copy_(normal(500, width) @ population)
    prior, directions = LogitPrior.of(seen), normal(width, hidden)
    truth = torch.softmax(normal(num_users, width) @ population, 1)

    def pairs(count: int) -> tuple[MixtureStatistics, Tensor]:
        owner = torch.arange(num_users).repeat_interleave(count)
        linear = normal(2 * len(owner), 1, hidden) @ directions.T
        index = torch.arange(2 * len(owner)).view(-1, 2)
        ones = torch.ones(1, width, width)
        first = torch.zeros(len(linear), dtype=torch.int64)
        return MixtureStatistics(linear, index, ones, first, "cosine", 1.0), owner

    def margins(statistics: MixtureStatistics, point: Tensor) -> Tensor:
        reward = statistics.reward(point)[..., 0]
        return reward[:, 1] - reward[:, 0]

    statistics, owner = pairs(num_comparisons)
    chance = torch.sigmoid(margins(statistics, truth[owner]))
    label = torch.where(torch.rand(len(owner), generator=draw) < chance, 1, -1)
    start = torch.zeros(len(owner), dtype=torch.int64)
    ones = torch.ones(len(owner))
    comparisons = UserComparisons(owner, PairFacts(label, start, start + 1, 0 * ones, ones))
    loss = PreferenceLoss("logistic", "last")
    logits = solve(statistics, comparisons, num_users, prior, loss)
    own = posterior((statistics, comparisons), logits, prior, loss)
    tests, owner = pairs(20)
    point = torch.softmax(logits, 1)[owner]
    error = margins(tests, point) - margins(tests, truth[owner])
    slope = (tests.linear[1::2] - tests.linear[::2])[:, 0]
    variance = torch.einsum("bk,bkl,bl->b", slope, own.covariance[owner], slope)
    inside = error.abs() <= 1.645 * variance.sqrt()
    return float(inside.float().mean()), float((error.square() / variance).mean().sqrt())


@pytest.mark.parametrize("num_comparisons", [2, 10, 50])
def test_intervals_hold_what_they_promise(num_comparisons: int) -> None:
    coverage, ratio = planted(300, num_comparisons)
    # 300 users: the standard error of a coverage of 0.9 is at most 0.02, as their own pairs go together.
    assert 0.85 <= coverage <= 0.96
    assert 0.85 <= ratio <= 1.15


def test_nothing_known_is_the_prior() -> None:
    prior = prior_of(2)

    class Nothing:
        def log_value(self, fitted: Tensor, point: Tensor) -> Tensor:
            return torch.zeros(fitted.shape[:2])

        def curvature(self, fitted: Tensor) -> Tensor:
            return torch.zeros(len(fitted), 2, 2)

    own = posterior_of(Nothing(), prior.mean[None], prior, Simplex(0.7))
    places = grid(2)
    away = places.double() - prior.mean
    density = -0.5 * ((away @ prior.precisions[0].double()) * away).sum(1)
    exact = moments(density, places, prior.mean, 0.7)
    torch.testing.assert_close(own.covariance[0].double(), exact, atol=0, rtol=0.03)


def test_comparisons_of_no_number_leave_a_covariance() -> None:
    statistics, comparisons = case("cosine", 3)
    broken = statistics._replace(linear=torch.full_like(statistics.linear, torch.nan))
    logits = fit((broken, comparisons))
    own = posterior((broken, comparisons), logits, prior_of(3), LOSS)
    assert own.covariance.isfinite().all()
