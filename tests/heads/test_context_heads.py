"""SPL, MRM and VRF against fp64 loops written from their formulas, and what each of them promises of its users."""

import math

import pytest
import torch
from torch import Tensor

from pal_ds.heads import Head, Mrm, Spl, UserState, Vrf
from pal_ds.heads.pair_flow import PairFlow
from tests.heads.test_more_heads import (
    NUM_PAIRS,
    H,
    L,
    check,
    encoded,
    exact_leaves,
    features,
    pairs,
)

CONTEXT = torch.tensor([[[1, 2], [3, 0]], [[4, 4], [0, 1]], [[2, 3], [1, 1]], [[0, 3], [4, 1]]])
LENGTH = torch.tensor([2, 1, 0, 2])
"""Unequal contexts, one of them empty."""


def context(b: int) -> tuple[Tensor, Tensor]:
    """(preferred, rejected) [N, H] of one user, fp64."""
    ends = features().response[:, -1].double()
    return ends[CONTEXT[b, : LENGTH[b], 0]], ends[CONTEXT[b, : LENGTH[b], 1]]


def leaky(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.2 * x)


def ordered_map(p: dict[str, Tensor], name: str, z: Tensor, code: Tensor) -> list[Tensor]:
    """Number i of the masked network, from the units before i alone."""
    of_code = p[f"{name}.of_code.weight"] @ code
    of_code = of_code + p.get(f"{name}.of_code.bias", torch.zeros(2 * L, dtype=torch.float64))
    before, out = p[f"{name}.before.weight"], p[f"{name}.out.weight"]
    hidden = []
    for j in range(2 * L):
        hidden.append(torch.tanh(of_code[j] + sum(before[j, k] * z[k] for k in range(j // 2))))
    return [sum(out[i, j] * hidden[j] for j in range(2 * i + 2)) for i in range(L)]


def through_flows(
    p: dict[str, Tensor], z: Tensor, d: Tensor, s: Tensor, num_flows: int = 2
) -> tuple[Tensor, Tensor]:
    log_volume = torch.zeros((), dtype=torch.float64)
    for f in range(num_flows):
        shift = ordered_map(p, f"flows.{f}.shift", z, d)
        half = [2.5 * v.tanh() for v in ordered_map(p, f"flows.{f}.log_variance", z.abs(), s)]
        z = torch.stack(
            [m.tanh() + v.exp() * x for m, v, x in zip(shift, half, z, strict=True)][::-1]
        )
        log_volume = log_volume + sum(half)
    return z, log_volume


def moments(p: dict[str, Tensor], first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """(mu, logvar) of codes [N, C], before any bound."""

    def linear(name: str, x: Tensor) -> Tensor:
        return p[f"encoder.{name}.weight"] @ x + p.get(f"encoder.{name}.bias", 0.0)

    h = [torch.cat([a, b]) for a, b in zip(first, second, strict=True)]
    mean = torch.zeros_like(h[0])
    for one in h:
        scores = torch.stack([linear("query", one) @ linear("key", two) for two in h])
        weight = torch.softmax(scores / math.sqrt(len(one)), 0)
        mean = mean + sum(w * linear("value", two) for w, two in zip(weight, h, strict=True))
    both = linear("moments", mean / len(h))
    return both[:L], both[L:]


@pytest.mark.parametrize(("symmetry", "form"), [("odd", "bilinear"), ("guided", "film")])
def test_spl(symmetry: str, form: str) -> None:
    """Codes, both distributions, flows, the divergence where z was drawn with its free nats, the guide, the reward."""
    torch.manual_seed(3)
    head = Spl(
        H, L, 4, symmetry=symmetry, reward_form=form, kl_weight=0.5, kl_schedule="linear",
        kl_period=20, free_nats=0.4, swap_guidance=0.7,
    )  # fmt: skip
    noise, p = torch.randn(NUM_PAIRS, L), exact_leaves(head)
    user = UserState(context=CONTEXT, context_length=LENGTH, normal=noise, update=11)

    def code(h: Tensor) -> Tensor:
        for layer in (0, 2, 4):
            h = h @ p[f"encoder.code.{layer}.weight"].T + p[f"encoder.code.{layer}.bias"]
            h = h if layer == 4 else leaky(h)
        return h

    zs, penalties = [], []
    for b in range(NUM_PAIRS):
        mu = logvar = torch.zeros(L, dtype=torch.float64)
        d = s = torch.zeros(2, dtype=torch.float64)
        guide = torch.zeros((), dtype=torch.float64)
        if LENGTH[b]:
            first, second = (code(h) for h in context(b))
            mu, logvar = moments(p, first, second)
            twin = moments(p, second, first)
            if symmetry == "odd":
                mu, logvar = (mu - twin[0]) / 2, (logvar + twin[1]) / 2
            mu, logvar = mu.tanh(), logvar.tanh()
            d, s = (first - second).mean(0) / 2, (first + second).mean(0) / 2
            if symmetry == "guided":
                cosine = torch.nn.functional.cosine_similarity
                turned = cosine(mu, twin[0].tanh().detach(), dim=0)
                kept = cosine(logvar, twin[1].tanh().detach(), dim=0)
                guide = 0.7 * ((1 + turned) / 2 + 0.1 * (1 - kept) / 2)
        eps = noise[b].double()
        z, log_volume = through_flows(p, mu + (logvar / 2).exp() * eps, d, s)
        log_q = -0.5 * (eps**2 + logvar).sum() - log_volume
        divergence = (log_q + 0.5 * (z**2).sum()).clamp(min=0.4)
        penalties.append(0.5 * 11 / 20 * divergence + guide)
        zs.append(z)
    z, x = torch.stack(zs), features().response.double()
    if form == "bilinear":
        mapped = pairs(x @ p["reward_of.map.weight"].T)
        reward = (mapped[..., :L] * z[:, None, None]).sum(-1) / math.sqrt(L) + mapped[..., L]
    else:
        own = {name.removeprefix("reward_of."): value for name, value in p.items()}
        hidden = pairs(x @ own["of_response.weight"].T + own["of_response.bias"])
        hidden = leaky(hidden + (z @ own["of_latent.weight"].T)[:, None, None])
        hidden = leaky(hidden @ own["hidden.weight"].T + own["hidden.bias"])
        film = leaky(z @ own["film.0.weight"].T + own["film.0.bias"])
        film = (film @ own["film.2.weight"].T + own["film.2.bias"])[:, None, None].tanh() / 2
        hidden = leaky((1 + film[..., :4]) * hidden + film[..., 4:])
        reward = (hidden @ own["out.weight"].T + own["out.bias"])[..., 0]
    check(head, user, (reward, reward[:, 1] - reward[:, 0], torch.stack(penalties)), p)


def test_a_flow_says_by_how_much_it_changes_volumes() -> None:
    torch.manual_seed(0)
    flow, z, d, s = PairFlow(4, 2), torch.randn(1, 4), torch.randn(1, 2), torch.randn(1, 2)
    jacobian = torch.autograd.functional.jacobian(lambda x: flow(x, d, s)[0], z)[0, :, 0]
    torch.testing.assert_close(flow(z, d, s)[1][0], torch.linalg.slogdet(jacobian)[1])
    # Unit i of z' comes from unit i of z and those before; they come out in reverse.
    assert not jacobian.flip(0).triu(1).any() and (jacobian.flip(0).diag() > 0).all()


@pytest.mark.parametrize("form", ["bilinear", "film"])
def test_the_twin_of_a_user_is_the_mirror_image(form: str) -> None:
    """Swapped comparisons give -z exactly, with the noise turned too; as likely before the prior as z."""
    torch.manual_seed(0)
    head, noise = (
        Spl(H, L, symmetry="odd", reward_form=form, free_nats=0.0),
        torch.randn(NUM_PAIRS, L),
    )
    user = UserState(context=CONTEXT, context_length=LENGTH, normal=noise)
    twin = user._replace(context=CONTEXT.flip(2), normal=-noise)
    one, other = head.encode(features(), user), head.encode(features(), twin)
    assert torch.equal(one, -other) and one[[0, 3]].abs().min() > 0 and not one[2].any()
    torch.testing.assert_close(head(features(), user).penalty, head(features(), twin).penalty)


def test_a_guided_encoder_learns_to_turn_around() -> None:
    torch.manual_seed(0)
    head = Spl(H, L, kl_weight=0.0, swap_guidance=1.0)
    optimizer = torch.optim.Adam(head.parameters(), 1e-2)
    user = UserState(context=CONTEXT[[0, 3]], context_length=LENGTH[[0, 3]])
    index = features().response_index[[0, 3]]
    some = features()._replace(response_index=index)
    guides = []
    for _ in range(150):
        penalty = head(some, user).penalty.mean()
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
        guides.append(penalty.item())
    assert guides[0] > 0.3 and guides[-1] < 0.1


def test_mrm() -> None:
    """Steps by autograd on each user's own loss, and the outer gradient through them."""
    torch.manual_seed(3)
    head = Mrm(H, 3, num_steps=2, first_rate=2.0)
    with torch.no_grad():
        head.start.copy_(torch.randn(3))
    p = exact_leaves(head)
    rewards = []
    for b in range(NUM_PAIRS):
        w = p["start"]
        for rate in p["log_rates"].exp():
            if LENGTH[b]:
                first, second = context(b)
                margin = ((first - second) @ p["basis"].T) @ torch.softmax(w, 0)
                loss = -torch.nn.functional.logsigmoid(margin).mean()
                (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
                w = w - rate * gradient
        x = features().response[features().response_index[b]].double()
        rewards.append(x @ p["basis"].T @ torch.softmax(w, 0))
    reward = torch.stack(rewards)
    user = UserState(context=CONTEXT, context_length=LENGTH)
    nothing = torch.zeros(NUM_PAIRS, dtype=torch.float64)
    check(head, user, (reward, reward[:, 1] - reward[:, 0], nothing), p)


def test_vrf() -> None:
    torch.manual_seed(3)
    head = Vrf(H, 3, L, 4, distance_scale=1.7, kl_weight=0.5)
    with torch.no_grad():
        head.base_logvar.copy_(torch.randn(3, L))
    p = exact_leaves(head)
    rewards, surenesses, divergences = [], [], []
    for b in range(NUM_PAIRS):
        mu = logvar = torch.zeros(L, dtype=torch.float64)
        if LENGTH[b]:
            first, second = context(b)
            one, other = encoded(p, first, second), encoded(p, second, first)
            mu, logvar = (one[0] - other[0]) / 2, (one[1] + other[1]) / 2
        sigma, base_sigma = (logvar / 2).exp(), (p["base_logvar"] / 2).exp()
        distance = [
            ((mu - p["base_mean"][k]) ** 2).sum() + ((sigma - base_sigma[k]) ** 2).sum()
            for k in range(3)
        ]
        weights = torch.softmax(-torch.stack(distance) / 1.7, 0)
        x = features().response[features().response_index[b]].double()
        rewards.append(x @ p["rewards"].T @ weights)
        surenesses.append(1 / (1 + math.pi / 8 * (sigma**2).mean()).sqrt())
        divergences.append(-0.5 * (1 + logvar - mu**2 - sigma**2).sum())
    reward = torch.stack(rewards)
    margin = (reward[:, 1] - reward[:, 0]) * torch.stack(surenesses)[:, None]
    user = UserState(context=CONTEXT, context_length=LENGTH)
    check(head, user, (reward, margin, 0.5 * torch.stack(divergences)), p)


@pytest.mark.parametrize("head", [Spl(H, L), Mrm(H), Vrf(H)], ids=lambda head: type(head).__name__)
def test_who_said_nothing_is_where_a_stranger_is(head: Head) -> None:
    """The row of a table that was never trained is zeros: it stands for users whom a run does not know."""
    head.eval()
    nobody = UserState(context=CONTEXT, context_length=torch.zeros_like(LENGTH))
    assert not head.encode(features(), nobody).any()
    stranger = UserState(mixture=torch.zeros(NUM_PAIRS, head.num_prototypes))
    assert torch.equal(head.reward(features(), nobody), head.reward(features(), stranger))
    with pytest.raises(ValueError, match="has none"):
        head.encode(features(), UserState())
    with pytest.raises(ValueError, match="needs a user"):
        head.mixture_weights(UserState())


def test_an_unsure_user_has_margins_nearer_to_zero_and_the_rewards_of_any_other() -> None:
    head = Vrf(H, num_bases=1, latent_dim=L).eval()
    sure, unsure = torch.zeros(NUM_PAIRS, 2 * L), torch.zeros(NUM_PAIRS, 2 * L)
    unsure[:, L:] = 3.0
    one, other = (head(features(), UserState(mixture=point)) for point in (sure, unsure))
    torch.testing.assert_close(one.reward, other.reward)
    assert (one.margin.abs() > 1.5 * other.margin.abs()).all()
