"""Edges of the heads: one prototype to the bit, the bound, half precision, cancellation."""

import pytest
import torch

from pal_ds.heads import BradleyTerry, Features, Head, PalA, PalB, UserState

H, T, C = 6, 4, 5
NUM_PAIRS = 4
USER_POINTS = ["f(Pw)", "f(P)w", "Pw"]


def _features(num_prompt_positions: int = 1) -> Features:
    draw = torch.Generator().manual_seed(1)
    return Features(
        torch.randn(5, T, H, generator=draw),
        torch.tensor([[0, 1], [2, 0], [3, 4], [0, 3]]),
        torch.randn(2, num_prompt_positions, H, generator=draw),
        torch.tensor([[0, 0], [0, 0], [1, 1], [0, 1]]),
        torch.tensor([2, 5]).clamp(max=num_prompt_positions),
    )


def _logits(num_prototypes: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(2)
    return torch.randn(NUM_PAIRS, num_prototypes, generator=draw)


@pytest.mark.parametrize("user_point", USER_POINTS)
def test_bound_penalty(user_point: str) -> None:
    torch.manual_seed(0)
    free = PalA(H, 3, user_point=user_point)
    logits = _logits(3)
    length = torch.linalg.vector_norm(free.locate(UserState(logits)), dim=-1).detach()
    bound = float(length.sort().values[1:3].mean())
    head = PalA(H, 3, user_point=user_point, bound=bound, bound_weight=2.5)
    head.load_state_dict(free.state_dict())
    leaf = logits.clone().requires_grad_()
    penalty = head(_features(), UserState(leaf)).penalty
    expected = [2.5 * max(0.0, float(x) - bound) for x in length]
    assert penalty.tolist() == pytest.approx(expected, rel=1e-5)
    assert 0 < sum(x > 0 for x in expected) < NUM_PAIRS, "some inside and some outside the bound"
    penalty.sum().backward()
    assert (leaf.grad.abs().sum(-1) > 0).tolist() == [x > 0 for x in expected]
    assert not free(_features(), UserState(logits)).penalty.any()


ONE_PROTOTYPE = [
    *(
        lambda p=p, s=s: PalA(
            H, 1, user_point=p, similarity=s, temperature=0.3, mixture="gumbel", bound=0.1
        )
        for p in USER_POINTS
        for s in ("distance", "cosine")
    ),
    lambda: PalB(H, 1, temperature=0.3, prompt_dropout=0.0),
    lambda: PalB(
        H, 1, temperature=0.3, prompt_position="aligned", mixture="gumbel", prompt_dropout=0.0
    ),
]


@pytest.mark.parametrize("build", ONE_PROTOTYPE)
def test_one_prototype_is_homogeneous_to_the_bit(build) -> None:
    torch.manual_seed(0)
    head = build()
    aligned = getattr(head, "prompt_position", "") == "aligned"
    features = _features(C if aligned else 1)
    first = head(features, UserState(torch.zeros(NUM_PAIRS, 1)))
    leaf = (100 * torch.randn(NUM_PAIRS, 1)).requires_grad_()
    other = head(features, UserState(leaf, gumbel=torch.rand(NUM_PAIRS, 1)))
    assert torch.equal(first.margin, other.margin)
    (other.margin.square().sum() + other.penalty.sum()).backward()
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize(
    "head",
    [PalA(H, 3), PalA(H, 3, similarity="cosine"), PalB(H, 3, prompt_dropout=0.0), BradleyTerry(H)],
)
def test_bf16_parameters_only_cost_their_own_rounding(head: Head) -> None:
    torch.manual_seed(0)
    features, user = _features(), UserState(_logits(head.num_prototypes))
    head = head.bfloat16()
    low = head(features, user)
    exact = head.float()(features, user)  # the same rounded parameters, fp32 arithmetic
    assert low.reward.dtype == low.margin.dtype == low.penalty.dtype == torch.float32
    assert (low.reward - exact.reward).abs().max() <= 0.03 * exact.reward.abs().max()
    low.margin.sum().backward()


def test_distance_survives_cancellation() -> None:
    """Nearby points far from the origin: expanding the square in fp32 would lose every digit."""
    head = PalA(H, 1, num_layers=1, residual=False, user_point="Pw")
    with torch.no_grad():
        head.projector.layers[0].weight.copy_(torch.eye(H))
        head.projector.layers[0].bias.zero_()
        head.prototypes.fill_(1000.0)
    response = torch.full((1, 1, H), 1000.0)
    response[..., 0] += 0.0625
    features = Features(response, torch.tensor([[0, 0]]))
    assert head.reward(features, UserState(torch.zeros(1, 1))).flatten().tolist() == [-0.0625] * 2


def test_prompt_dropout_hides_whole_prompts_in_training() -> None:
    torch.manual_seed(0)
    head = PalB(H, 3, prompt_position="aligned", prompt_dropout=0.5)
    features = _features(C)._replace(prompt=torch.randn(40, C, H))
    shown, _ = head.eval().maps(features)
    nothing, _ = head.maps(features._replace(prompt=torch.zeros(40, C, H)))
    made, _ = head.train().maps(features)
    is_shown = (made - shown).abs().amax((1, 2, 3)) < 1e-6
    expected = torch.where(is_shown[:, None, None, None], shown, nothing)
    assert torch.allclose(made, expected)
    assert 10 < int(is_shown.sum()) < 30
    with pytest.raises(ValueError, match=r"prompt_dropout is 1\.0"):
        PalB(H, prompt_dropout=1.0)
