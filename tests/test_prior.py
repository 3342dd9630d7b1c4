"""The prior of new users: it finds the clusters that are there, and fits by it are the posterior's means."""

import math

import pytest
import torch
from torch import Tensor

from pal_ds import clusters
from pal_ds.clusters import Clusters, _log_density, find_clusters
from pal_ds.first_order import Choices, adam, margins_of
from pal_ds.heads import Features, Lore
from pal_ds.heads.statistics import MixtureStatistics
from pal_ds.localise import solve
from pal_ds.losses import PreferenceLoss
from pal_ds.prior import LogitPrior, posterior_mean, without_repetition
from pal_ds.terms import Comparisons
from pal_ds.users import UserTable

H = 8
CORNERS = torch.tensor([[3.0, -1, -1, -1], [-1, 3, -1, -1], [-1, -1, 3, -1], [-1, -1, -1, 3]])


def blobs(num_each: int, spread: float, seed: int = 0) -> Tensor:
    """Logits of users around the four corners, fp64 [4 num_each, 4]."""
    draw = torch.Generator().manual_seed(seed)
    noise = spread * torch.randn(4 * num_each, 4, generator=draw)
    return (CORNERS.repeat_interleave(num_each, 0) + noise).double()


def table_of(logits: Tensor) -> UserTable:
    table = UserTable(logits.shape[1], [f"u{number}" for number in range(len(logits))])
    table.logits.copy_(logits)
    return table


@pytest.mark.parametrize("num_each", [6, 30, 2000])
def test_finds_the_clusters_that_are_there(num_each: int) -> None:
    found = find_clusters(blobs(num_each, 0.3))
    assert found is not None and len(found.weight) == 4
    nearest = torch.cdist(CORNERS.double(), found.mean).min(1).values
    assert nearest.max() < 0.5
    assert found.weight.tolist() == pytest.approx([0.25] * 4, abs=0.02)


@pytest.mark.parametrize("num_points", [0, 1, 3, 7, 40, 400, 5000])
def test_a_single_gaussian_has_no_clusters(num_points: int) -> None:
    draw = torch.Generator().manual_seed(num_points)
    assert find_clusters(torch.randn(num_points, 5, generator=draw).double()) is None


@pytest.mark.parametrize("num_points", [8, 12, 16, 24])
def test_a_few_points_of_one_gaussian_have_no_clusters(num_points: int) -> None:
    """The best of their partitions is a little better than none: in a third of these draws, of 8 points."""
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        assert find_clusters(torch.randn(num_points, 3, generator=draw).double()) is None


@pytest.mark.parametrize("num_each", [300, 2000, 2500])
def test_users_may_come_in_a_fixed_turn_of_groups(num_each: int) -> None:
    """As user 0, 4, 8 .. of one group and 1, 5, 9 .. of another do: whoever is looked at is of all of them."""
    found = find_clusters(blobs(num_each, 0.3).view(4, num_each, 4).transpose(0, 1).reshape(-1, 4))
    assert found is not None and len(found.weight) == 4
    assert found.weight.tolist() == pytest.approx([0.25] * 4, abs=0.05)


def test_a_fit_that_has_not_converged_is_judged_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(clusters, "MAX_STEPS", 1)
    found = find_clusters(blobs(30, 0.3))
    assert found is not None and len(found.weight) == 4


def test_alike_users_and_one_prototype_have_no_clusters() -> None:
    assert find_clusters(torch.zeros(50, 3).double()) is None
    assert find_clusters(torch.zeros(50, 0).double()) is None


def test_log_density_is_that_of_a_mixture_of_gaussians() -> None:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, generator=draw).double()
    covariance = root @ root.T + 0.1 * torch.eye(3)
    weight, mean = torch.tensor([0.2, 0.8]).double(), torch.randn(2, 3, generator=draw).double()
    points = torch.randn(20, 3, generator=draw).double()
    parts = torch.distributions.MultivariateNormal(mean, covariance)
    expected = parts.log_prob(points[:, None]) + weight.log()
    own = _log_density(points, Clusters(weight, mean, covariance, 0.0))
    torch.testing.assert_close(own, expected)


def test_the_density_integrates_to_one() -> None:
    """Over the line of centred logits of two prototypes, with everybody and clusters at their own heights."""
    logits = torch.cat([torch.full((20, 1), -4.0), torch.full((60, 1), 2.0)])
    logits = logits + 0.2 * torch.randn(80, 1, generator=torch.Generator().manual_seed(0))
    prior = LogitPrior.of(table_of(torch.cat([logits, -logits], 1)))
    assert prior.num_components == 3
    line = torch.linspace(-40, 40, 400_001)
    points = torch.stack([line, -line], 1)
    density = torch.zeros(len(line), dtype=torch.float64)
    for component in range(3):
        density += torch.exp(-prior.penalty(points, torch.full((len(line),), component)))
    # The line is sqrt(2) as long in the plane of both logits; a Gaussian's constant is left out of heights.
    step = 80 / 400_000 * math.sqrt(2)
    assert float(density.sum()) * step == pytest.approx(math.sqrt(2 * math.pi), rel=1e-3)


def test_starts_lie_under_components_and_clusters_come_last() -> None:
    prior = LogitPrior.of(table_of(blobs(10, 0.3)))
    starts = prior.starts()
    assert starts.component[-4:].tolist() == [1, 2, 3, 4]
    assert torch.equal(starts.points[starts.point[-4:]], prior.means[1:])
    assert (starts.component == 0).sum() == 5
    torch.testing.assert_close(starts.points.mean(1), torch.zeros(len(starts.points)))


def test_repetitions_count_once() -> None:
    evidence = torch.tensor([[1.0, 1, 5], [2, 1, 4], [0, 1, 3]])
    component = torch.tensor([[0, 1, 2], [0, 1, 2], [1, 1, 2]])
    left = without_repetition(evidence, component)
    inf = math.inf
    assert left.T.tolist() == [[-inf, 2.0, 0.0], [1.0, -inf, -inf], [5.0, -inf, -inf]]


def test_posterior_mean_is_that_of_mixtures() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, evidence = torch.randn(3, 4, 7, generator=draw), torch.randn(3, 7, generator=draw)
    evidence[1, 3] = -math.inf
    found = posterior_mean(logits, evidence, 0.5)
    expected = (torch.softmax(evidence, 0)[:, None] * torch.softmax(logits / 0.5, 1)).sum(0)
    torch.testing.assert_close(torch.softmax(found / 0.5, 0), expected)


def choices(num_users: int, num_each: int, seed: int, spread: float) -> tuple:
    """A LoRe world of four tastes: (statistics, comparisons, users' own mixtures)."""
    torch.manual_seed(0)
    head = Lore(H, 4).eval().requires_grad_(False)
    for parameter in head.parameters():
        parameter.mul_(4 / parameter.std())
    draw = torch.Generator().manual_seed(seed)
    taste = CORNERS[torch.randint(4, (num_users,), generator=draw)]
    taste = taste + spread * torch.randn(num_users, 4, generator=draw)
    owner = torch.arange(num_users).repeat_interleave(num_each)
    responses = torch.randn(2 * len(owner), 1, H, generator=draw)
    features = Features(responses, torch.arange(2 * len(owner)).view(-1, 2))
    statistics = head.statistics(features)
    reward = statistics.reward(torch.softmax(taste, 1)[owner])[..., 0]
    probability = torch.sigmoid(reward[:, 1] - reward[:, 0])
    label = torch.where(torch.rand(len(owner), generator=draw) < probability, 1, -1)
    zeros = torch.zeros(len(owner))
    comparisons = Comparisons(owner, label, zeros, torch.ones(len(owner), 1))
    return statistics, comparisons, torch.softmax(taste, 1)


@pytest.mark.parametrize("num_each", [1, 3, 10])
def test_clusters_serve_new_users_better_than_one_gaussian(num_each: int) -> None:
    statistics, comparisons, own = choices(400, num_each, seed=1, spread=0.3)
    prior = LogitPrior.of(table_of(blobs(20, 0.3)))
    gaussian = LogitPrior(prior.means[:1], prior.precisions[:1], prior.heights[:1])
    error = [
        float((torch.softmax(solve(statistics, comparisons, 400, each, "logistic"), 1) - own).abs().sum(1).mean())
        for each in (prior, gaussian)
    ]  # fmt: skip
    assert error[0] < 0.9 * error[1]


def test_who_is_like_nobody_is_believed_in_the_end() -> None:
    """A taste between all clusters: after many comparisons it is found, since not everybody need be in a cluster."""
    statistics, comparisons, _ = choices(30, 400, seed=2, spread=0.3)
    reward = statistics.reward(torch.full((len(comparisons.user), 4), 0.25))[..., 0]
    label = torch.where(reward[:, 1] > reward[:, 0], 1, -1)
    prior = LogitPrior.of(table_of(blobs(20, 0.3)))
    found = solve(statistics, comparisons._replace(label=label), 30, prior, "logistic")
    assert torch.softmax(found, 1).max() < 0.45


@pytest.mark.parametrize("num_each", [1, 2, 5])
def test_fits_are_the_means_of_the_posterior(num_each: int) -> None:
    """Against sums over 40,000 draws from the prior itself, weighted by their likelihood."""
    statistics, comparisons, _ = choices(40, num_each, seed=3, spread=0.3)
    prior = LogitPrior.of(table_of(blobs(50, 0.3)))
    found = torch.softmax(solve(statistics, comparisons, 40, prior, "logistic"), 1)
    draw = torch.Generator().manual_seed(0)
    which = torch.multinomial(torch.ones(4), 40_000, replacement=True, generator=draw) + 1
    factor = torch.linalg.cholesky(torch.linalg.inv(prior.precisions[1].double())).float()
    drawn = prior.means[which] + torch.randn(40_000, 4, generator=draw) @ factor.T
    mixtures = torch.softmax(drawn, 1)
    likelihood = torch.zeros(40, len(mixtures))
    for row, (user, label) in enumerate(zip(comparisons.user, comparisons.label, strict=True)):
        one = statistics._replace(
            response_index=statistics.response_index[row].expand(len(mixtures), 2)
        )
        reward = one.reward(mixtures)[..., 0]
        likelihood[user] += torch.nn.functional.logsigmoid(label * (reward[:, 1] - reward[:, 0]))
    expected = torch.softmax(likelihood, 1) @ mixtures
    assert (found - expected).abs().max() < 0.1
    assert (found - expected).abs().mean() < 0.02


def test_features_that_are_no_numbers_leave_the_typical_user() -> None:
    """As no comparisons do, and nobody else hears of it; with clusters and without."""
    statistics, comparisons, _ = choices(4, 3, seed=4, spread=0.3)
    linear = statistics.linear.clone()
    linear[statistics.response_index[comparisons.user == 2]] = torch.nan
    broken = statistics._replace(linear=linear)
    zeros = torch.zeros_like(comparisons.user)
    facts = (comparisons.user, comparisons.label, zeros, zeros + 1, comparisons.required)

    def adam_of(statistics: MixtureStatistics, prior: LogitPrior) -> Tensor:
        margins = margins_of(Lore(H, 4), Features(linear, zeros), statistics, comparisons.user)
        return adam(Choices(margins, PreferenceLoss(), *facts), 4, prior, 1.0)

    def newton_of(statistics: MixtureStatistics, prior: LogitPrior) -> Tensor:
        return solve(statistics, comparisons, 4, prior, "logistic")

    clustered = LogitPrior.of(table_of(blobs(20, 0.3)))
    gaussian = LogitPrior.gaussian(torch.tensor([0.3, 0.1, -0.2, -0.2]), torch.eye(4))
    others = torch.tensor([0, 1, 3])
    for prior in (clustered, gaussian):
        for fit in (adam_of, newton_of):
            found = fit(broken, prior)
            torch.testing.assert_close(found[2], prior.mean)
            torch.testing.assert_close(
                found[others], fit(statistics, prior)[others], atol=1e-3, rtol=0
            )
