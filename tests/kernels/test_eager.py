"""The plain-torch definitions: exact derivatives, and the same numbers as the heads and losses that train today."""

import itertools

import pytest
import torch
from torch import Tensor

from pal_ds.heads import Features, PalA, PalB, UserState
from pal_ds.heads.geometry import bounded_scale
from pal_ds.kernels.mix import mix
from pal_ds.kernels.pair_loss import pair_loss
from pal_ds.losses import PairFacts, PreferenceLoss
from tests.kernels.cases import comparisons

B, R, T, H, K = 6, 5, 4, 10, 3


@pytest.mark.parametrize(("cosine", "points"), list(itertools.product((False, True), (1, 2))))
def test_derivatives_in_fp64(cosine: bool, points: int) -> None:
    case = comparisons(3, 4, 5, cosine=cosine, points=points, num_responses=4).to(torch.float64)
    leaves = [case.response.requires_grad_(), case.point.requires_grad_()]
    if cosine:
        leaves.append(case.scale.requires_grad_())

    def total(response: Tensor, point: Tensor, scale: Tensor | None = None) -> Tensor:
        arguments = (response, case.index, point, case.facts, scale, "logistic", "cumulative")
        return pair_loss(*arguments, implementation="torch").total

    assert torch.autograd.gradcheck(total, leaves)


def test_derivatives_of_the_mix_in_fp64() -> None:
    user, source = torch.tensor([1, 0, 1]), torch.tensor([0, 1, 1])
    leaves = [torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)]
    for leaf in leaves:
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits, prototypes: mix(logits, user, prototypes, source, 0.5), leaves
    )


def world() -> tuple[Features, UserState, dict[str, Tensor]]:
    torch.manual_seed(1)
    facts = comparisons(B, T, 1, seed=5).facts
    index = torch.randint(R, (B, 2))
    features = Features(
        torch.randn(R, T, H), index, torch.randn(R, 1, H), index, torch.ones(R).long()
    )
    return features, UserState(torch.randn(B, K).requires_grad_()), facts._asdict()


def by_head(head: PalA | PalB, features: Features, user: UserState, facts: dict) -> list[Tensor]:
    """Total and gradients as the training step computes them."""
    loss = PreferenceLoss("logistic", "cumulative")
    output = head(features, user)
    each = loss(
        output.margin, facts["label"], facts["start"], facts["end"], facts["required_margin"]
    )
    return gradients((each * facts["weight"]).sum(), head, user)


def gradients(total: Tensor, head: PalA | PalB, user: UserState) -> list[Tensor]:
    return [total, *torch.autograd.grad(total, [user.logits, *head.parameters()])]


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("similarity", ["distance", "cosine"])
def test_pal_a_end_to_end(
    request: pytest.FixtureRequest, similarity: str, implementation: str
) -> None:
    """Mix, projector and pair loss give the head's loss and all its gradients."""
    if implementation == "triton":
        request.getfixturevalue("interpreter")
    features, user, facts = world()
    head = PalA(H, K, similarity=similarity, temperature=0.8)
    rows, zeros = torch.arange(B), torch.zeros(B, dtype=torch.int64)
    mixed, _ = mix(user.logits, rows, head.prototypes[None], zeros, 0.8, implementation)
    scale = bounded_scale(head.log_scale) if similarity == "cosine" else None
    output = pair_loss(
        head.projector(features.response),
        features.response_index,
        head.projector(mixed)[:, None],
        PairFacts(**facts),
        scale,
        "logistic",
        "cumulative",
        implementation,
    )
    fused, plain = gradients(output.total, head, user), by_head(head, features, user, facts)
    for made, wanted in zip(fused, plain, strict=True):
        torch.testing.assert_close(made, wanted, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_pal_b_end_to_end(request: pytest.FixtureRequest, implementation: str) -> None:
    """The K maps run once per prompt and are mixed without a tensor [B, r, K, d]."""
    if implementation == "triton":
        request.getfixturevalue("interpreter")
    features, user, facts = world()
    head = PalB(H, K, temperature=0.8, prompt_dropout=0.0)
    maps = head.prompt_projectors(features.prompt)[:, 0]
    rows = torch.arange(B).repeat_interleave(2)
    prompts = features.prompt_index.flatten()
    mixed, _ = mix(user.logits, rows, maps, prompts, 0.8, implementation)
    output = pair_loss(
        head.response_projector(features.response),
        features.response_index,
        mixed.view(B, 2, H),
        PairFacts(**facts),
        bounded_scale(head.log_scale),
        "logistic",
        "cumulative",
        implementation,
    )
    fused, plain = gradients(output.total, head, user), by_head(head, features, user, facts)
    for made, wanted in zip(fused, plain, strict=True):
        torch.testing.assert_close(made, wanted, rtol=2e-5, atol=2e-6)
