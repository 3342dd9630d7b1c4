"""The heads beyond PAL against fp64 loops written from their formulas: rewards, margins, penalties and gradients."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from pal_ds.heads import Categorical, Features, Head, Lore, MeanVariance, PerDomain, UserState, Vpl
from pal_ds.heads.latent_user import kl_share
from pal_ds.losses import PreferenceLoss

H, T, NUM_PAIRS, L = 5, 3, 4, 3
TOLERANCE = 1e-6


def features() -> Features:
    draw = torch.Generator().manual_seed(1)
    return Features(
        torch.randn(5, T, H, generator=draw), torch.tensor([[0, 1], [2, 0], [3, 4], [0, 3]])
    )


def check(
    head: Head, user: UserState, wanted: tuple[Tensor, Tensor, Tensor], leaves: dict[str, Tensor]
) -> None:
    """Reward, margin, penalty and the gradients of a loss of all three, relative to each one's largest entry."""
    output = head(features(), user)
    found = (output.reward, output.margin, output.penalty)
    for name, one, other in zip(("reward", "margin", "penalty"), found, wanted, strict=True):
        error = (one.double() - other).abs().max()
        assert error <= TOLERANCE * max(1.0, float(other.detach().abs().max())), name

    def total(parts: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        reward, margin, penalty = parts
        return reward.square().sum() - torch.nn.functional.logsigmoid(margin).sum() + penalty.sum()

    total(found).backward()
    total(wanted).backward()
    for name, parameter in head.named_parameters():
        own, exact = parameter.grad, leaves[name].grad
        assert own is not None and exact is not None, name
        error = (own.double() - exact).abs().max()
        assert error <= 2e-6 * max(1.0, float(exact.abs().max())), name


def exact_leaves(head: Head) -> dict[str, Tensor]:
    return {name: p.detach().double().requires_grad_() for name, p in head.named_parameters()}


def pairs(table: Tensor) -> Tensor:
    """[B, 2, T, ...] from [R, T, ...]."""
    return torch.stack([torch.stack([table[i] for i in row]) for row in features().response_index])


def phi(x: Tensor) -> Tensor:
    return (1 + torch.erf(x / math.sqrt(2))) / 2


def test_mean_variance() -> None:
    head = MeanVariance(H, variance_penalty=0.3)
    p = exact_leaves(head)
    both = pairs(features().response.double() @ p["weight"].T + p["bias"])
    mean, variance = both[..., 0], (1 + both[..., 1].exp()).log() ** 2
    win = phi((mean[:, 1] - mean[:, 0]) / (variance[:, 0] + variance[:, 1]).sqrt())
    penalty = 0.3 * (variance[:, 0] + variance[:, 1])[:, -1]
    check(head, UserState(), (mean, (win / (1 - win)).log(), penalty), p)


def test_mean_variance_is_finite_far_out() -> None:
    """Where Phi underflows, the loss goes on growing and has gradients."""
    head = MeanVariance(1)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0], [0.0]]))
    response = torch.tensor([[[0.0]], [[60.0]]], requires_grad=True)
    output = head(Features(response, torch.tensor([[0, 1]])), UserState())
    loss = PreferenceLoss()(output.margin, torch.tensor([-1]), torch.tensor([0]), torch.tensor([1]))
    loss.backward()
    assert loss.isfinite() and loss > 1000 and response.grad.abs().min() > 10


def test_categorical() -> None:
    head = Categorical(H, num_atoms=4, entropy_weight=0.2)
    p = exact_leaves(head)
    logits = pairs(features().response.double() @ p["weight"].T + p["bias"])
    q = logits.exp() / logits.exp().sum(-1, keepdim=True)
    win = torch.zeros(NUM_PAIRS, T, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            share = 1.0 if j > i else 0.5 if j == i else 0.0
            win = win + q[:, 1, :, j] * q[:, 0, :, i] * share
    reward = sum(q[..., i] * i / 3 for i in range(4))
    mean = (q[:, 0, -1] + q[:, 1, -1]) / 2
    penalty = 0.2 * (mean * mean.log()).sum(-1)
    check(head, UserState(), (reward, (win / (1 - win)).log(), penalty), p)


def test_a_tie_of_categorical_responses_is_even() -> None:
    same = features()._replace(response_index=torch.tensor([[2, 2]]))
    assert Categorical(H)(same, UserState()).margin.abs().max() < 1e-6


def test_lore_and_per_domain() -> None:
    logits = torch.randn(NUM_PAIRS, 3, generator=torch.Generator().manual_seed(2))
    lore, domains = Lore(H, num_prototypes=3, temperature=2.0), PerDomain(H, num_prototypes=3)
    group = torch.tensor([0, 2, -1, 1])
    zeros = torch.zeros(NUM_PAIRS, dtype=torch.float64)
    weights = (logits.double() / 2).exp()
    mixtures = {
        "basis": weights / weights.sum(-1, keepdim=True),
        "directions": torch.tensor([[1, 0, 0], [0, 0, 1], [1 / 3] * 3, [0, 1, 0]]).double(),
    }
    for head, name, user in (
        (lore, "basis", UserState(logits)),
        (domains, "directions", UserState(group=group)),
    ):
        p = exact_leaves(head)
        scores = pairs(features().response.double() @ p[name].T)
        reward = (scores * mixtures[name].float().double()[:, None, None]).sum(-1)
        check(head, user, (reward, reward[:, 1] - reward[:, 0], zeros), p)


def encoded(p: dict[str, Tensor], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(mu, logvar) of one user's comparisons [N, H], pair by pair."""

    def linear(name: str, x: Tensor) -> Tensor:
        y = p[f"encoder.{name}.weight"] @ x
        return y + p[f"encoder.{name}.bias"] if f"encoder.{name}.bias" in p else y

    def leaky(x: Tensor) -> Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    h = []
    for a, b in zip(first, second, strict=True):
        x = leaky(linear("pair.0", torch.cat([a, b])))
        h.append(linear("pair.4", leaky(linear("pair.2", x))))
    out = torch.zeros_like(h[0])
    for one in h:
        scores = torch.stack([linear("query", one) @ linear("key", two) for two in h])
        weight = (scores / math.sqrt(L)).exp()
        weight = weight / weight.sum()
        out = out + sum(w * linear("value", two) for w, two in zip(weight, h, strict=True)) / len(h)
    moments = linear("moments", out)
    return moments[:L], moments[L:]


@pytest.mark.parametrize("symmetry", ["odd", "none"])
@pytest.mark.parametrize("reward_form", ["bilinear", "mlp"])
def test_vpl(symmetry: str, reward_form: str) -> None:
    """Unequal contexts, one of them empty; reparameterised z, KL with its schedule, the swap guide."""
    torch.manual_seed(3)
    guide = 0.7 if symmetry == "none" else 0.0
    head = Vpl(
        H, L, 4, symmetry=symmetry, reward_form=reward_form,
        kl_weight=0.5, kl_schedule="cosine", kl_period=8, swap_guidance=guide,
    )  # fmt: skip
    context = torch.tensor([[[1, 2], [3, 0]], [[4, 4], [0, 1]], [[2, 3], [1, 1]], [[0, 3], [4, 1]]])
    length, noise = torch.tensor([2, 1, 0, 2]), torch.randn(NUM_PAIRS, L)
    user = UserState(context=context, context_length=length, normal=noise, update=11)
    p = exact_leaves(head)
    ends = features().response[:, -1].double()
    zs, kls, guides = [], [], []
    for b in range(NUM_PAIRS):
        first, second = ends[context[b, : length[b], 0]], ends[context[b, : length[b], 1]]
        mu = logvar = torch.zeros(L, dtype=torch.float64)
        extra = torch.zeros((), dtype=torch.float64)
        if length[b]:
            mu, logvar = encoded(p, first, second)
            other_mu, other_logvar = encoded(p, second, first)
            if symmetry == "odd":
                mu, logvar = (mu - other_mu) / 2, (logvar + other_logvar) / 2
            cosine = torch.nn.functional.cosine_similarity
            extra = (1 + cosine(mu, other_mu, dim=0) + 1 - cosine(logvar, other_logvar, dim=0)) / 4
        zs.append(mu + (logvar / 2).exp() * noise[b].double())
        kls.append(-0.5 * (1 + logvar - mu**2 - logvar.exp()).sum())
        guides.append(extra)
    z = torch.stack(zs)
    x = features().response.double()
    if reward_form == "bilinear":
        mapped = pairs(x @ p["map.weight"].T)
        reward = (mapped[..., :L] * z[:, None, None]).sum(-1) / math.sqrt(L) + mapped[..., L]
    else:
        hidden = pairs(x @ p["of_response.weight"].T + p["of_response.bias"])
        hidden = hidden + (z @ p["of_latent.weight"].T)[:, None, None]
        for layer in ("rest.1", "rest.3"):
            hidden = torch.where(hidden > 0, hidden, 0.2 * hidden)
            hidden = hidden @ p[f"{layer}.weight"].T + p[f"{layer}.bias"]
        reward = hidden[..., 0]
    share = 0.1 + 0.9 * (1 + math.cos(math.pi * (3 / 8 - 1))) / 2
    penalty = 0.5 * share * torch.stack(kls) + guide * torch.stack(guides)
    check(head, user, (reward, reward[:, 1] - reward[:, 0], penalty), p)


def test_schedules_of_the_divergence() -> None:
    """By the number of the update, hence the same after a resume and however an update is split."""
    linear, cosine = (partial(kl_share, schedule, 10) for schedule in ("linear", "cosine"))
    assert [linear(u) for u in (0, 5, 10, 99)] == [0, 0.5, 1, 1]
    assert [round(cosine(u), 6) for u in (0, 5, 10, 15)] == [0.1, 0.55, 0.1, 0.55]
    assert linear(None) == cosine(None) == kl_share("constant", 10, 0) == 1


def test_a_context_has_no_order_and_turns_around_when_swapped() -> None:
    head = Vpl(H, L).eval()
    context = torch.tensor([[[1, 2], [3, 0], [4, 1]]])
    length = torch.tensor([3])
    point = head.encode(features(), UserState(context=context, context_length=length))
    turned = head.encode(features(), UserState(context=context.flip(2), context_length=length))
    mixed = head.encode(features(), UserState(context=context.flip(1), context_length=length))
    torch.testing.assert_close(turned, -point)
    torch.testing.assert_close(mixed, point)
    assert point.abs().min() > 0


def test_training_and_scoring_see_points_of_one_scale() -> None:
    """Without noise the reward of a context is the reward of its point; the noise has the posterior's spread."""
    torch.manual_seed(0)
    head = Vpl(H, L)
    context = {
        "context": torch.tensor([[[1, 2], [3, 0]]] * 4),
        "context_length": torch.tensor([2] * 4),
    }
    silent = UserState(**context, normal=torch.zeros(4, L))
    point = head.encode(features(), UserState(**context))
    still = head.reward(features(), UserState(mixture=point))
    torch.testing.assert_close(head(features(), silent).reward, still)
    noisy = UserState(**context, normal=torch.ones(4, L))
    assert not torch.allclose(head(features(), noisy).reward, still)
    torch.testing.assert_close(head.eval()(features(), noisy).reward, still)
    head.train()
