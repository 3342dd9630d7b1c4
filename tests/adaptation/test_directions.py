"""Users with a direction of their own: the fit against a generic optimiser, evidence against quadrature, the prior."""

import math
import resource

import pytest
import torch
from torch import Tensor

from pal_ds.adaptation.blocks import UserComparisons
from pal_ds.adaptation.directions import DirectionPrior, fit_directions, learn_prior, terms_by_user
from pal_ds.adaptation.objective import SHAPES
from pal_ds.adaptation.reward_vectors import Labels, most_likely
from pal_ds.heads.base import Features, UserState
from pal_ds.heads.lore import Lore
from pal_ds.losses import PairFacts, PreferenceLoss

NUM_USERS, NUM_PAIRS, WIDTH, NUM_PROTOTYPES = 4, 9, 12, 3


def head_of(**options: object) -> Lore:
    torch.manual_seed(1)
    return Lore(WIDTH, NUM_PROTOTYPES, mixture="free", **options).eval()


def world(
    num_users: int = NUM_USERS, num_pairs: int = NUM_PAIRS, weights: Tensor | None = None
) -> tuple[Features, UserComparisons]:
    """Comparisons of users in turn, by `weights` [U, WIDTH] where given, else at random; some weigh less."""
    torch.manual_seed(0)
    num = num_users * num_pairs
    features = Features(torch.randn(2 * num, 1, WIDTH), torch.arange(2 * num).view(num, 2))
    user = torch.arange(num) % num_users
    difference = features.response[1::2, 0] - features.response[0::2, 0]
    margin = torch.randn(num) if weights is None else (difference * weights[user]).sum(1)
    label = torch.where(torch.rand(num) < margin.sigmoid(), 1, -1)
    zeros = torch.zeros(num, dtype=torch.int64)
    weight = torch.where(torch.arange(num) % 4 == 0, 0.5, 1.0)
    facts = PairFacts(label, zeros, zeros + 1, 0.1 * torch.rand(num), weight)
    return features, UserComparisons(user, facts)


def prior_of(head: Lore, residual_variance: float) -> DirectionPrior:
    torch.manual_seed(2)
    point, factors = torch.randn(3).double(), torch.randn(2, 3).double()
    logits = torch.cat([(point * 3 - 1) * head.temperature, torch.zeros(WIDTH)])
    return DirectionPrior(point, factors, residual_variance, logits.float())


@pytest.mark.parametrize("kind", ["logistic", "smooth_hinge"])
@pytest.mark.parametrize("num_pairs", [NUM_PAIRS, 3 * WIDTH])
def test_fit_is_the_most_likely_direction(num_pairs: int, kind: str) -> None:
    """Minus log posterior in coordinates z ~ N(0, I), s = point + z F, e = s_e y, by LBFGS in fp64."""
    head, (features, comparisons) = head_of(temperature=0.7), world(num_pairs=num_pairs)
    prior, loss = prior_of(head, 0.3), PreferenceLoss(kind)
    fitted = fit_directions(head, features, comparisons, NUM_USERS + 1, prior=prior, loss=loss)
    assert torch.equal(fitted[-1], prior.mean)  # who said nothing
    basis, facts = head.basis.detach().double(), comparisons.facts
    difference = (features.response[1::2, 0] - features.response[0::2, 0]).double()

    def objective(z: Tensor, y: Tensor) -> Tensor:
        direction = (prior.point + z @ prior.factors) @ basis + math.sqrt(0.3) * y
        margin = (difference * direction[comparisons.user]).sum(1)
        value = SHAPES[kind](facts.label * margin - facts.required_margin.double())[0]
        return (facts.weight * value).sum() + (z.square().sum() + y.square().sum()) / 2

    z, y = torch.zeros(NUM_USERS, 2).double(), torch.zeros(NUM_USERS, WIDTH).double()
    leaves = [z.requires_grad_(), y.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        leaves, max_iter=2000, line_search_fn="strong_wolfe", tolerance_grad=1e-10
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(z, y)
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        point = head.mixture_weights(UserState(fitted[:-1])).double()
        torch.testing.assert_close(
            point[:, :3], prior.point + z @ prior.factors, atol=2e-4, rtol=1e-3
        )
        torch.testing.assert_close(point[:, 3:], math.sqrt(0.3) * y, atol=2e-4, rtol=1e-3)


def test_reward_is_that_of_weights_and_own_direction() -> None:
    head, (features, comparisons) = head_of(), world()
    logits = torch.randn(NUM_USERS, NUM_PROTOTYPES + WIDTH)
    reward = head.reward(features, UserState(logits[comparisons.user]))
    direction = (1 + logits[:, :3]) / 3 @ head.basis + logits[:, 3:]
    states = features.response[:, 0][features.response_index]
    expected = torch.einsum("brh,bh->br", states, direction[comparisons.user])
    torch.testing.assert_close(reward[..., 0], expected)
    with pytest.raises(ValueError, match="this head's have 3, or 12 more"):
        head.reward(features, UserState(None, None, torch.zeros(1, 5)))


def test_length_weight_is_a_ridge_on_the_users_vector() -> None:
    head, (features, comparisons) = head_of(length_weight=0.3), world()
    logits = torch.randn(len(comparisons.user), NUM_PROTOTYPES, requires_grad=True)
    output = head.compare(features, UserState(logits))
    vector = (1 + logits) / NUM_PROTOTYPES @ head.basis
    torch.testing.assert_close(output.penalty, 0.15 * vector.square().sum(1))
    with pytest.raises(ValueError, match="length_weight"):
        Lore(WIDTH, length_weight=-1.0)


def test_evidence_is_the_probability_of_labels() -> None:
    """One comparison: the integral over its margin, by a fine sum. Laplace errs by below 0.01 nats."""
    variance, mean = 1.0, 0.4
    one = torch.ones(1, 1).double()
    fit = most_likely(
        variance * one[None], mean * one, Labels(one, 0 * one, one), SHAPES["logistic"]
    )
    margin = torch.linspace(-12, 12, 20001).double()
    density = torch.exp(-((margin - mean) ** 2) / 2 / variance) / math.sqrt(2 * math.pi * variance)
    exact = torch.trapezoid(density * margin.sigmoid(), margin).log()
    assert fit.log_evidence.item() == pytest.approx(exact.item(), abs=0.01)


def learnt(weights: Tensor, basis: Tensor, points: Tensor, num_pairs: int = 60) -> DirectionPrior:
    head = head_of()
    head.basis.data.copy_(basis)
    features, comparisons = world(len(weights), num_pairs, weights)
    with torch.no_grad():
        terms = list(terms_by_user(head, features, comparisons, len(weights), PreferenceLoss()))
        return learn_prior(head, points, terms, torch.arange(len(weights)), SHAPES["logistic"])


def test_prior_knows_that_users_are_against_each_other() -> None:
    """Each of three is for their own answer and against those of the others: a new one is against their mean."""
    basis = (
        2 * torch.linalg.qr(torch.randn(WIDTH, 3, generator=torch.Generator().manual_seed(3))).Q.T
    )
    points = 3 * torch.eye(3) - 1.5
    against = learnt(points @ basis, basis, points)
    alike = torch.tensor([[1.0, 0.2, 0.1], [0.9, 0.3, 0.0], [1.1, 0.1, 0.2]]) * 2
    agreed = learnt(alike @ basis, basis, alike)
    assert (against.point @ points.double().mean(0)) < 0 < (agreed.point @ alike.double().mean(0))


def test_prior_of_users_of_the_span_has_less_residual() -> None:
    """Users beyond the run's span need a residual; users within it do not."""
    generator = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(WIDTH, 3, generator=generator)).Q.T
    points = torch.randn(40, 3, generator=generator) * 2
    own = torch.randn(40, WIDTH, generator=generator)
    within = learnt(points @ basis, basis, points)
    beyond = learnt(points @ basis + own, basis, points)
    assert within.residual_variance < 0.1 < 0.5 < beyond.residual_variance < 2.0


def test_a_user_of_many_comparisons_costs_no_matrix_of_their_number() -> None:
    weights = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(5))
    head, (features, comparisons) = head_of(), world(1, 20_000, weights)
    prior, loss = prior_of(head, 1.0), PreferenceLoss()
    started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fitted = fit_directions(head, features, comparisons, 1, prior=prior, loss=loss)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - started) * 1024
    assert grown < 20_000**2 * 8 / 4
    direction = (fitted[0, :3] / head.temperature + 1) / 3 @ head.basis.detach() + fitted[0, 3:]
    assert torch.nn.functional.cosine_similarity(direction, weights[0], dim=0) > 0.99
