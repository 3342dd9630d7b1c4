"""The prior of new users: it finds the clusters that are there, and fits by it are the posterior's means."""

import math

import pytest
import torch
from torch import Tensor

from pal_ds.adaptation.blocks import UserComparisons
from pal_ds.adaptation.gradient import adam, losses_of, margins_of
from pal_ds.adaptation.newton import solve
from pal_ds.adaptation.prior import (
    LogitPrior,
    mean_over_components,
    posterior_mean,
    without_repetition,
)
from pal_ds.heads import Features, Lore
from pal_ds.heads.sufficient_statistics import MixtureStatistics
from pal_ds.losses import PairFacts, PreferenceLoss
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


def test_a_new_user_is_like_nobody_as_often_as_one_in_all_and_one() -> None:
    """The weights of components: 1 / (U + 1) for everybody, the shares of clusters for the rest."""
    prior = LogitPrior.of(table_of(blobs(20, 0.3)))
    which = torch.tensor([0, 1, 1, 1, 1])
    weights = torch.exp(prior.heights - 0.5 * torch.logdet(prior.precisions)[which])
    expected = torch.tensor([1.0, 20, 20, 20, 20]) / 81
    torch.testing.assert_close(weights, expected, rtol=1e-3, atol=0)


def test_eight_clusters_of_unequal_size_lie_where_their_users_do() -> None:
    """Around prototypes of which everybody's mean is far."""
    sizes = torch.tensor([4, 4, 5, 5, 6, 6, 30, 40])
    corners = (4 * torch.eye(8) - 0.5).repeat_interleave(sizes, 0)
    noise = 0.2 * torch.randn(corners.shape, generator=torch.Generator().manual_seed(0))
    prior = LogitPrior.of(table_of(corners + noise))
    assert prior.num_components == 9
    assert torch.cdist(4 * torch.eye(8) - 0.5, prior.means[1:]).min(1).values.max() < 0.5


def test_the_generic_user_is_none_of_the_users() -> None:
    """Who is said to be at their middle, by its row, adds nothing to how far they lie from there."""
    logits = blobs(3, 1.0)[:5].float()
    with_generic = UserTable(4, ["a", "b", "population", "c", "d", "e"])
    with_generic.logits.copy_(torch.cat([logits[:2], logits.mean(0, keepdim=True), logits[2:]]))
    prior, own = LogitPrior.of(with_generic), LogitPrior.of(table_of(logits))
    torch.testing.assert_close(prior.precisions, own.precisions)
    torch.testing.assert_close(prior.means, own.means)


def test_a_start_towards_a_prototype_lies_in_its_cluster_too() -> None:
    prior = LogitPrior.of(table_of(blobs(10, 0.3)))
    starts = prior.starts
    again = starts.component[6:10] - 1
    assert starts.point_index[6:10].tolist() == [1, 2, 3, 4]
    assert prior.means[1:][again].argmax(1).tolist() == [0, 1, 2, 3]


def test_the_centre_is_a_start_where_the_population_is_far_from_it() -> None:
    far = torch.tensor([2.0, -1.0, -1.0])
    for mean, expected in ((far, 5), (0.1 * far, 4)):
        starts = LogitPrior.gaussian(mean, torch.eye(3)).starts
        assert len(starts.point_index) == expected
        assert (starts.points == 0).all(1).any() == (expected == 5)


def test_starts_lie_under_components_and_clusters_come_last() -> None:
    prior = LogitPrior.of(table_of(blobs(10, 0.3)))
    starts = prior.starts
    assert starts.component[-4:].tolist() == [1, 2, 3, 4]
    assert torch.equal(starts.points[starts.point_index[-4:]], prior.means[1:])
    assert (starts.component == 0).sum() == 5
    torch.testing.assert_close(starts.points.mean(1), torch.zeros(len(starts.points)))


def test_repetitions_count_once() -> None:
    evidence = torch.tensor([[1.0, 1, 5], [2, 1, 4], [0, 1, 3]])
    component = torch.tensor([[0, 1, 2], [0, 1, 2], [1, 1, 2]])
    left = without_repetition(evidence, component)
    inf = math.inf
    assert left.T.tolist() == [[-inf, 2.0, 0.0], [1.0, -inf, -inf], [5.0, -inf, -inf]]


def test_lanes_that_end_in_one_minimum_weigh_as_one() -> None:
    prior = LogitPrior.of(table_of(blobs(10, 0.3)))
    starts = prior.starts
    values = torch.full((len(starts.point_index), 1), 100.0)
    own = [int((starts.component == m).nonzero()[-1]) for m in (1, 2)]
    order = torch.tensor([[own[0]], [own[0]], [own[1]]])
    values[own] = 1.0
    logits = CORNERS[[0, 0, 1]].T.unsqueeze(-1)
    found = mean_over_components(prior, 1.0, values, order, logits, torch.full((3, 1), -2.0))
    expected = torch.softmax(CORNERS[:2], 1).mean(0)
    torch.testing.assert_close(torch.softmax(found[:, 0], 0), expected)


def test_posterior_mean_is_that_of_mixtures() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, evidence = torch.randn(3, 4, 7, generator=draw), torch.randn(3, 7, generator=draw)
    evidence[1, 3] = -math.inf
    found = posterior_mean(logits, evidence, 0.5)
    expected = (torch.softmax(evidence, 0)[:, None] * torch.softmax(logits / 0.5, 1)).sum(0)
    torch.testing.assert_close(torch.softmax(found / 0.5, 0), expected)


def comparisons_of(owner: Tensor, label: Tensor) -> UserComparisons:
    """One scored position each."""
    zeros = torch.zeros_like(owner)
    required, weight = torch.zeros(2, len(owner))
    return UserComparisons(owner, PairFacts(label, zeros, zeros + 1, required, weight + 1))


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
    comparisons = comparisons_of(owner, label)
    return statistics, comparisons, torch.softmax(taste, 1)


@pytest.mark.parametrize("num_each", [1, 3, 10])
def test_clusters_serve_new_users_better_than_one_gaussian(num_each: int) -> None:
    statistics, comparisons, own = choices(400, num_each, seed=1, spread=0.3)
    prior = LogitPrior.of(table_of(blobs(20, 0.3)))
    gaussian = LogitPrior(prior.means[:1], prior.precisions[:1], prior.heights[:1])
    error = [
        float((torch.softmax(solve(statistics, comparisons, 400, each, PreferenceLoss()), 1) - own).abs().sum(1).mean())
        for each in (prior, gaussian)
    ]  # fmt: skip
    assert error[0] < 0.9 * error[1]


def test_who_is_like_nobody_is_believed_in_the_end() -> None:
    """A taste between all clusters: after many comparisons it is found, since not everybody need be in a cluster."""
    statistics, comparisons, _ = choices(30, 400, seed=2, spread=0.3)
    reward = statistics.reward(torch.full((len(comparisons.user), 4), 0.25))[..., 0]
    label = torch.where(reward[:, 1] > reward[:, 0], 1, -1)
    prior = LogitPrior.of(table_of(blobs(20, 0.3)))
    comparisons = comparisons._replace(facts=comparisons.facts._replace(label=label))
    found = solve(statistics, comparisons, 30, prior, PreferenceLoss())
    assert torch.softmax(found, 1).max() < 0.45


@pytest.mark.parametrize("num_each", [1, 2, 5])
def test_fits_are_the_means_of_the_posterior(num_each: int) -> None:
    """Against sums over 40,000 draws from the prior itself, weighted by their likelihood."""
    statistics, comparisons, _ = choices(40, num_each, seed=3, spread=0.3)
    prior = LogitPrior.of(table_of(blobs(50, 0.3)))
    found = torch.softmax(solve(statistics, comparisons, 40, prior, PreferenceLoss()), 1)
    draw = torch.Generator().manual_seed(0)
    which = torch.multinomial(torch.ones(4), 40_000, replacement=True, generator=draw) + 1
    factor = torch.linalg.cholesky(torch.linalg.inv(prior.precisions[1].double())).float()
    drawn = prior.means[which] + torch.randn(40_000, 4, generator=draw) @ factor.T
    mixtures = torch.softmax(drawn, 1)
    likelihood = torch.zeros(40, len(mixtures))
    for row, (user, label) in enumerate(
        zip(comparisons.user, comparisons.facts.label, strict=True)
    ):
        one = statistics._replace(
            response_index=statistics.response_index[row].expand(len(mixtures), 2)
        )
        reward = one.reward(mixtures)[..., 0]
        likelihood[user] += torch.nn.functional.logsigmoid(label * (reward[:, 1] - reward[:, 0]))
    expected = torch.softmax(likelihood, 1) @ mixtures
    assert (found - expected).abs().max() < 0.1
    assert (found - expected).abs().mean() < 0.02


def test_who_is_like_nobody_is_found_by_integrals() -> None:
    """Two tastes, users between them with many comparisons: against sums over the line of logits.

    Whether they are of a cluster or of nobody's hangs on the volume of their likelihood: without it, or with that of
    a softmax where it bends down, the mean error is 0.0190 and 0.0173, not 0.0156.
    """
    num_users, num_each = 200, 40
    torch.manual_seed(0)
    head = Lore(H, 2).eval().requires_grad_(False)
    head.basis.mul_(3 / head.basis.std())
    draw = torch.Generator().manual_seed(5)
    own = 0.3 * torch.randn(num_users, 1, generator=draw)
    owner = torch.arange(num_users).repeat_interleave(num_each)
    responses = torch.randn(2 * len(owner), 1, H, generator=draw)
    statistics = head.statistics(Features(responses, torch.arange(2 * len(owner)).view(-1, 2)))
    between = statistics.linear[1::2, 0] - statistics.linear[::2, 0]
    margin = (between * torch.softmax(torch.cat([own, -own], 1), 1)[owner]).sum(1)
    label = torch.where(torch.rand(len(owner), generator=draw) < torch.sigmoid(margin), 1, -1)
    comparisons = comparisons_of(owner, label)
    run = torch.cat([torch.full((4, 1), -2.0), torch.full((4, 1), 2.0)])
    run = run + 0.3 * torch.randn(8, 1, generator=torch.Generator().manual_seed(0))
    prior = LogitPrior.of(table_of(torch.cat([run, -run], 1)))
    assert prior.num_components == 3
    line = torch.linspace(-10, 10, 1001)
    points = torch.stack([line, -line], 1)
    everywhere = torch.ones(len(line), dtype=torch.int64)
    density = torch.stack([-prior.penalty(points, m * everywhere) for m in range(3)]).logsumexp(0)
    each = torch.nn.functional.logsigmoid(label[:, None] * (between @ torch.softmax(points, 1).T))
    posterior = torch.softmax(each.view(num_users, num_each, -1).sum(1) + density, 1)
    expected = posterior @ torch.softmax(points, 1)
    found = torch.softmax(solve(statistics, comparisons, num_users, prior, PreferenceLoss()), 1)
    assert (found - expected).abs().mean() < 0.0164


@pytest.mark.parametrize("num_each", [1, 3, 10])
def test_adam_and_newton_find_the_same_means(num_each: int) -> None:
    """Of all components, of those that neither followed too."""
    statistics, comparisons, _ = choices(60, num_each, seed=3, spread=0.3)
    prior, zeros = LogitPrior.of(table_of(blobs(20, 0.3))), torch.zeros_like(comparisons.user)
    features = Features(statistics.linear, zeros)
    margins = margins_of(Lore(H, 4), features, statistics, comparisons.user)
    losses = losses_of(margins, PreferenceLoss(), comparisons)
    by_adam = adam(losses, comparisons.user, 60, prior, 1.0)
    by_newton = solve(statistics, comparisons, 60, prior, PreferenceLoss())
    difference = (torch.softmax(by_adam, 1) - torch.softmax(by_newton, 1)).abs()
    assert difference.max() < 0.03 and difference.mean() < 2e-3


def test_features_that_are_no_numbers_leave_the_typical_user() -> None:
    """As no comparisons do, and nobody else hears of it; with clusters and without."""
    statistics, comparisons, _ = choices(4, 3, seed=4, spread=0.3)
    linear = statistics.linear.clone()
    linear[statistics.response_index[comparisons.user == 2]] = torch.nan
    broken = statistics._replace(linear=linear)
    zeros = torch.zeros_like(comparisons.user)

    def adam_of(statistics: MixtureStatistics, prior: LogitPrior) -> Tensor:
        margins = margins_of(Lore(H, 4), Features(linear, zeros), statistics, comparisons.user)
        losses = losses_of(margins, PreferenceLoss(), comparisons)
        return adam(losses, comparisons.user, 4, prior, 1.0)

    def newton_of(statistics: MixtureStatistics, prior: LogitPrior) -> Tensor:
        return solve(statistics, comparisons, 4, prior, PreferenceLoss())

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
