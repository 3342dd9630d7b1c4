"""The reliability of new users against a search of one number, and points and reliability against both at once."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize, minimize_scalar

from pal_ds.adaptation import reliability
from pal_ds.adaptation.blocks import UserComparisons
from pal_ds.adaptation.fit import Chunk, fit_chunk
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.adaptation.reliability import most_likely_reliability
from pal_ds.heads import Lore, PalA
from pal_ds.heads.base import Features, Head, UserState
from pal_ds.losses import PairFacts, PreferenceLoss

NUM_USERS, NUM_PAIRS, VARIANCE = 5, 9, 0.7


def facts_of(label: torch.Tensor) -> PairFacts:
    num = len(label)
    start = torch.zeros(num, dtype=torch.int64)
    target = torch.where(label == 0, 0.5, (label + 1) / 2)
    return PairFacts(label, start, start + 1, 0.2 * (label != 0), torch.ones(num), target)


@pytest.mark.parametrize("ties", ["half", "rao_kupper", "davidson"])
def test_one_number_for_each_user(ties: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    owner = torch.arange(NUM_USERS * NUM_PAIRS) % NUM_USERS
    margin = 2 * torch.randn(len(owner), 1, generator=draw)
    label = margin[:, 0].sign().long()
    # The first user answers by a coin, the second against the margins, the third says "neither" to all.
    label = torch.where(owner == 0, (-1) ** torch.arange(len(owner)), label)
    label = torch.where(owner == 1, -label, torch.where(owner == 2, 0, label))
    loss, threshold = PreferenceLoss(ties=ties), torch.tensor([0.6])
    given = threshold if loss.has_threshold else None
    comparisons = UserComparisons(owner, facts_of(label), given)
    margin[owner == 3] = torch.nan
    found = most_likely_reliability(
        margin, comparisons, NUM_USERS + 1, loss=loss, variance=VARIANCE
    )
    for user in range(NUM_USERS):
        facts = facts_of(label[owner == user])

        def cost(r: float, user: int = user, facts: PairFacts = facts) -> float:
            each = loss(
                margin[owner == user].double() * np.exp(r),
                facts.label,
                facts.start,
                facts.end,
                facts.required_margin,
                target=facts.target,
                threshold=given,
            )
            return float(each.double().sum()) + r * r / (2 * VARIANCE)

        if user == 3:
            assert found[user] == 0, "margins that are no numbers say nothing"
            continue
        grid = np.linspace(-4, 4, 801)
        near = grid[np.argmin([cost(r) for r in grid])]
        best = minimize_scalar(cost, bounds=(near - 0.02, near + 0.02), method="bounded")
        assert cost(float(found[user])) < best.fun + 1e-4
        assert float(found[user]) == pytest.approx(float(best.x), abs=0.01)
    assert found[NUM_USERS] == 0
    assert found[1] < found[0] < found[4]


def chunk_of(head: Head, features: Features, owner: torch.Tensor, label: torch.Tensor) -> Chunk:
    facts = facts_of(label)
    parts = {"gumbel": None, "context": None, "context_length": None, "group": None, "normal": None}
    batch: Any = SimpleNamespace(facts=lambda: facts, **parts)
    return Chunk(head, features, batch, owner, NUM_USERS, None)


@pytest.mark.parametrize("kind", ["linear", "cosine", "two_layers"])
def test_points_and_reliability_together(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns end where a search over both at once does, and are nearly there after the usual number."""
    torch.manual_seed(3)
    head: Head = Lore(4, 3) if kind == "linear" else PalA(4, 3, similarity="cosine")
    if kind == "two_layers":
        # Without statistics: fitted by Adam.
        head = PalA(4, 3, num_layers=2, user_point="f(Pw)")
    owner = torch.arange(NUM_USERS * NUM_PAIRS) % NUM_USERS
    responses = torch.randn(2 * len(owner), 1, 4)
    index = torch.arange(2 * len(owner)).view(-1, 2)
    features, label = Features(responses, index), torch.randn(len(owner)).sign().long()
    prior = LogitPrior.gaussian(torch.zeros(3), torch.eye(3))
    prior = LogitPrior(prior.means, prior.precisions, prior.heights, prior.space, VARIANCE)
    loss = PreferenceLoss()
    chunk = chunk_of(head, features, owner, label)

    def objective(logits: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        facts = facts_of(label)
        margin = head(features, UserState(logits[owner])).margin * r[owner].exp()[:, None]
        each = loss(margin, label, facts.start, facts.end, facts.required_margin)
        total = torch.zeros(len(r)).index_add(0, owner, each)
        zeros = torch.zeros(len(r), dtype=torch.int64)
        return total + prior.penalty(logits, zeros) + r.square() / (2 * VARIANCE)

    def fitted() -> torch.Tensor:
        found = fit_chunk(chunk, loss, prior, "auto", prior.mean.repeat(NUM_USERS, 1))
        assert found.log_reliability is not None
        with torch.no_grad():
            return objective(found.logits, found.log_reliability)

    usual = fitted()
    monkeypatch.setattr("pal_ds.adaptation.fit.NUM_TURNS", 9)
    many = fitted()

    def cost(x: np.ndarray) -> tuple[float, np.ndarray]:
        """Of all users: none is in another's way."""
        both = torch.from_numpy(x).float().view(NUM_USERS, 4).requires_grad_()
        value = objective(both[:, :3], both[:, 3]).sum()
        (slope,) = torch.autograd.grad(value, both)
        return value.item(), slope.flatten().double().numpy()

    ends = []
    for start in np.random.default_rng(0).normal(size=(4, NUM_USERS * 4)):
        x = torch.from_numpy(minimize(cost, start, jac=True, method="L-BFGS-B").x).float()
        with torch.no_grad():
            ends.append(objective(x.view(NUM_USERS, 4)[:, :3], x.view(NUM_USERS, 4)[:, 3]))
    best = torch.stack(ends).amin(0)
    assert (many < best + 0.02).all(), (many, best)
    assert (usual < many + 0.02).all(), (usual, many)
    assert reliability.NUM_TURNS < 9
