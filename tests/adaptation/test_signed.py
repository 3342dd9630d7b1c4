"""Users with weights of any sign: heads, statistics and solver agree, and the solver finds what a generic one finds."""

import pytest
import torch
from torch import Tensor

from pal_ds.adaptation.blocks import UserComparisons
from pal_ds.adaptation.newton import solve
from pal_ds.adaptation.prior import LogitPrior, posterior_mean
from pal_ds.heads import Features, Head, Lore, PalA, PalB, UserState
from pal_ds.losses import PairFacts, PreferenceLoss
from pal_ds.training.init_from.origin import logits_of
from pal_ds.users import UserTable

H, K, NUM_USERS, NUM_PAIRS = 6, 3, 4, 7
HEADS: dict[str, Head] = {
    "LoRe": Lore(H, K, mixture="signed", temperature=0.7),
    "PAL-A distance": PalA(H, K, num_layers=1, mixture="signed"),
    "PAL-A cosine": PalA(
        H, K, num_layers=1, user_point="Pw", similarity="cosine", mixture="signed"
    ),
    "PAL-B": PalB(H, K, num_layers=1, mixture="signed"),
}
SPACES = {"LoRe": "linear", "PAL-A distance": "affine", "PAL-A cosine": "linear", "PAL-B": "linear"}


@pytest.fixture(params=HEADS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def pairs() -> tuple[Features, UserComparisons]:
    draw = torch.Generator().manual_seed(1)
    num = NUM_USERS * NUM_PAIRS
    index = torch.arange(2 * num).view(num, 2)
    prompts = torch.randn(3, 1, H, generator=draw)
    response = torch.randn(2 * num, 1, H, generator=draw)
    features = Features(response, index, prompts, index % 3, torch.ones(3, dtype=torch.int64))
    label = torch.where(torch.rand(num, generator=draw) < 0.5, 1, -1)
    zeros = torch.zeros(num, dtype=torch.int64)
    facts = PairFacts(label, zeros, zeros + 1, torch.zeros(num), torch.ones(num))
    return features, UserComparisons(torch.arange(num) % NUM_USERS, facts)


def test_points_and_statistics_are_the_heads_own(name: str) -> None:
    head, (features, _) = HEADS[name].eval(), pairs()
    assert head.space == SPACES[name] and not head.on_simplex
    logits = torch.randn(NUM_USERS * NUM_PAIRS, K, generator=torch.Generator().manual_seed(2))
    statistics = head.statistics(features)
    assert statistics is not None
    with torch.no_grad():
        point = head.mixture_weights(UserState(logits))
        assert (point < 0).any()
        torch.testing.assert_close(statistics.points(logits), point)
        expected = head.reward(features, UserState(logits))
        torch.testing.assert_close(statistics.reward(point), expected, atol=1e-4, rtol=1e-4)
        even = head.mixture_weights(UserState(torch.zeros(1, K)))
    torch.testing.assert_close(even, torch.full((1, K), 1 / K))
    if head.space == "affine":
        torch.testing.assert_close(point.sum(1), torch.ones(len(point)))


def test_softmax_bends_away_from_it(name: str) -> None:
    """Near even weights signed ones are the softmax's tangent: the gap falls with the square of the logits."""
    head, draw = HEADS[name], torch.Generator().manual_seed(3)
    direction = torch.randn(1, K, generator=draw)
    direction = direction - direction.mean()
    gaps = []
    for size in (0.1, 0.05):
        signed = head.eval().mixture_weights(UserState(size * direction))
        gaps.append(float((signed - torch.softmax(size * direction / head.temperature, 1)).norm()))
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("name", ["LoRe", "PAL-A distance"], indirect=False)
def test_the_solver_finds_the_minimum(name: str) -> None:
    head, (features, comparisons) = HEADS[name].eval(), pairs()
    facts, owner = comparisons.facts, comparisons.user
    mean, precision = torch.tensor([0.5, -0.2, 0.1]), 0.5 * torch.eye(K) + 0.1
    prior = LogitPrior.gaussian(mean, precision, head.space)
    statistics = head.statistics(features)
    assert statistics is not None
    fitted = solve(statistics, comparisons, NUM_USERS, prior, PreferenceLoss())

    def objective(logits: Tensor) -> Tensor:
        margin = head.compare(features, UserState(logits[owner])).margin[:, 0]
        loss = torch.nn.functional.softplus(-facts.label * margin)
        cost = prior.penalty(logits, torch.zeros(NUM_USERS, dtype=torch.int64))
        return loss.new_zeros(NUM_USERS).index_add(0, owner, loss) + cost

    best = torch.full((NUM_USERS,), torch.inf)
    for seed in range(3):
        start = torch.randn(NUM_USERS, K, generator=torch.Generator().manual_seed(seed))
        leaf = start.requires_grad_()
        optimizer = torch.optim.LBFGS([leaf], max_iter=300, line_search_fn="strong_wolfe")

        def closure(leaf: Tensor = leaf, optimizer: torch.optim.LBFGS = optimizer) -> Tensor:
            optimizer.zero_grad()
            total = objective(leaf).sum()
            total.backward(inputs=[leaf])
            return total

        optimizer.step(closure)
        best = torch.minimum(best, objective(leaf).detach())
    assert (objective(fitted).detach() - best).max() < 1e-4


def test_prior_is_about_all_of_the_weights() -> None:
    """Users who differ by the sum of their weights alone: a prior of mixtures is blind to it, this one is not."""
    table = UserTable(K, [f"u{number}" for number in range(20)])
    table.logits.copy_(torch.linspace(-2, 2, 20)[:, None] + torch.tensor([0.1, 0.0, -0.1]))
    signed, mixtures = LogitPrior.of(table, "linear"), LogitPrior.of(table)
    up = torch.ones(1, K)
    nobody = torch.zeros(1, dtype=torch.int64)
    assert signed.penalty(signed.mean + up, nobody) > signed.penalty(signed.mean[None], nobody)
    torch.testing.assert_close(
        mixtures.penalty(mixtures.mean + up, nobody), mixtures.penalty(mixtures.mean[None], nobody)
    )


def test_mean_of_candidates_is_that_of_their_points() -> None:
    logits, evidence = torch.tensor([[1.0, -3.0], [3.0, 1.0]]), torch.tensor([0.0, 0.0])
    torch.testing.assert_close(
        posterior_mean(logits, evidence, 0.5, "linear"), torch.tensor([2.0, -1.0])
    )


def test_logits_are_read_off_points(name: str) -> None:
    """`train.init_from` an export: users' points become logits again."""
    head = HEADS[name].eval()
    points = head.mixture_weights(UserState(torch.randn(5, K)))
    logits = logits_of(head, points)
    assert logits is not None
    torch.testing.assert_close(head.mixture_weights(UserState(logits)), points)


def test_choices_without_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="no approximation of signed weights"):
        Lore(H, K, mixture="signed", evaluation="hard")
    for head in (PalA, PalB):
        with pytest.raises(ValueError, match=r"mixture is 'free'.*the head Lore"):
            head(H, K, mixture="free")
