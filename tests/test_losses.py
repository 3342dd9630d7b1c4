"""Losses and token weights against loops written from the definitions."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from pal_ds.data.parse_lists import pairs_of_list
from pal_ds.errors import UserError
from pal_ds.losses import (
    PreferenceLoss,
    decision_margin,
    hinge,
    logistic,
    smooth_hinge,
    token_weights,
)

START = torch.tensor([0, 2, 3, 4])
END = torch.tensor([5, 3, 5, 4])
LABEL = torch.tensor([1, -1, -1, 1])
T = 5


def _scalar(kind: str, m: float) -> float:
    if kind == "logistic":
        return math.log1p(math.exp(-m))
    if kind == "hinge":
        return max(0.0, 1 - m)
    if m <= 0:
        return 0.5 - m
    return (1 - m) ** 2 / 2 if m < 1 else 0.0


def _weight(weighting: str, step: int, length: int) -> float:
    return {
        "last": float(step == length - 1),
        "mean": 1 / length,
        "cumulative": 2 * (step + 1) / (length * (length + 1)),
    }[weighting]


@pytest.mark.parametrize("kind", ["logistic", "hinge", "smooth_hinge"])
@pytest.mark.parametrize("weighting", ["last", "mean", "cumulative"])
@pytest.mark.parametrize("required", [False, True])
def test_matches_the_loop(kind: str, weighting: str, required: bool) -> None:
    margin = 2 * torch.randn(4, T, generator=torch.Generator().manual_seed(0))
    needed = torch.tensor([0.0, 0.5, 1.0, 2.0]) if required else None
    ours = PreferenceLoss(kind, weighting)(margin, LABEL, START, END, needed)
    for b in range(4):
        length = int(END[b] - START[b])
        total = 0.0
        for step in range(length):
            m = int(LABEL[b]) * float(margin[b, START[b] + step])
            m -= float(needed[b]) if needed is not None else 0.0
            total += _weight(weighting, step, length) * _scalar(kind, m)
        assert float(ours[b]) == pytest.approx(total, rel=1e-5, abs=1e-7)
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("weighting", ["last", "mean", "cumulative"])
def test_weights_sum_to_one_inside_the_window_only(weighting: str) -> None:
    weight = token_weights(weighting, START, END, T)
    assert torch.allclose(weight.sum(-1), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    position = torch.arange(T)
    outside = (position < START[:, None]) | (position >= END[:, None])
    assert (weight[outside] == 0).all()


def test_cumulative_counts_do_not_overflow() -> None:
    n = 100_000
    weight = token_weights("cumulative", torch.tensor([0]), torch.tensor([n]), n)
    assert float(weight.double().sum()) == pytest.approx(1.0, rel=1e-6)
    assert float(weight[0, -1]) == pytest.approx(2 / (n + 1), rel=1e-6)


@pytest.mark.parametrize("kind", ["logistic", "hinge", "smooth_hinge"])
@pytest.mark.parametrize("weighting", ["last", "mean", "cumulative"])
@pytest.mark.parametrize("required", [False, True])
def test_padding_reaches_neither_value_nor_gradient(
    kind: str, weighting: str, required: bool
) -> None:
    margin = torch.zeros(3, 5)
    margin[:, 0] = float("inf")
    margin[:, 4] = float("nan")
    margin[2, 3] = -float("inf")
    margin.requires_grad_()
    # The last window is empty: whatever its row holds, it adds nothing.
    start, end = torch.tensor([1, 3, 2]), torch.tensor([3, 4, 2])
    needed = torch.tensor([0.5, 0.0, 1.0]) if required else None
    label = torch.tensor([1, -1, 1])
    loss = PreferenceLoss(kind, weighting)(margin, label, start, end, needed)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and (loss[:2] > 0).all() and loss[2] == 0
    assert margin.grad is not None
    counts = token_weights(weighting, start, end, 5) > 0
    assert (margin.grad[~counts] == 0).all()
    assert (margin.grad * label[:, None] < 0)[counts].all()


@pytest.mark.parametrize("weighting", ["last", "mean", "cumulative"])
def test_hinge_has_no_slope_beyond_its_corner(weighting: str) -> None:
    """At label * margin = 1 + required exactly the slope is 0, as it is for torch's clamp."""
    margin = torch.tensor([[1.5, 9.0], [-2.0, 9.0]], requires_grad=True)
    window = (torch.zeros(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
    needed = torch.tensor([0.5, 1.0])
    loss = PreferenceLoss("hinge", weighting)(margin, torch.tensor([1, -1]), *window, needed)
    loss.sum().backward()
    assert margin.grad is not None
    assert (loss == 0).all() and (margin.grad == 0).all()


@pytest.mark.parametrize("shape", [logistic, hinge, smooth_hinge])
def test_extreme_margins_stay_finite(shape) -> None:
    m = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4], requires_grad=True)
    value = shape(m)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(m.grad).all()
    assert (value[:-1] >= value[1:]).all()
    assert m.grad[-1] == 0


def test_smooth_hinge_is_smooth_at_its_seams() -> None:
    m = torch.tensor([-1e-4, 1e-4, 1 - 1e-4, 1 + 1e-4], requires_grad=True)
    smooth_hinge(m).sum().backward()
    assert torch.allclose(m.grad, torch.tensor([-1.0, -1.0, 0.0, 0.0]), atol=2e-4)


def test_bf16_margins_are_lifted_before_the_loss() -> None:
    margin = torch.tensor([[0.0078125]], dtype=torch.bfloat16)
    window = (torch.tensor([0]), torch.tensor([1]))
    loss = PreferenceLoss("logistic")(margin, torch.tensor([1]), *window)
    assert float(loss) == pytest.approx(_scalar("logistic", 0.0078125), rel=1e-6)


def test_decision_margin_is_the_last_position_of_the_window() -> None:
    margin = torch.arange(20.0).view(4, 5)
    assert decision_margin(margin, END).tolist() == [4.0, 7.0, 14.0, 18.0]


@pytest.mark.parametrize("choice", [{"kind": "square"}, {"token_weighting": "all"}])
def test_unknown_choices_are_refused_by_name(choice: dict) -> None:
    # Where the suite runs with type checks, an unknown choice already stops at the signature.
    with pytest.raises((UserError, TypeCheckError), match=next(iter(choice))):
        PreferenceLoss(**choice)


def test_the_pairs_of_a_list_have_the_masked_listwise_loss() -> None:
    """DSP's loss over r responses with padding and ties, in fp64 from its formula, against our mean over pairs."""
    draw = torch.Generator().manual_seed(0)
    reward = torch.randn(6, 5, generator=draw)
    # -1 pads lists of fewer responses.
    scores = torch.tensor(
        [[3, 1, 2, 1, 0], [1, 1, 1, 1, 1], [2, 0, -1, -1, -1],
         [0, 4, 4, 2, -1], [5, 4, 3, 2, 1], [1, 0, -1, -1, -1]]
    )  # fmt: skip
    total, count, pairs = torch.zeros((), dtype=torch.float64), 0, []
    for row in range(6):
        for i in range(5):
            for j in range(5):
                sign = (scores[row, j] - scores[row, i]).sign()
                if sign != 0 and scores[row, i] >= 0 and scores[row, j] >= 0:
                    difference = reward[row, j].double() - reward[row, i].double()
                    total = total - torch.nn.functional.logsigmoid(difference * sign)
                    count += 1
        own = [float(score) for score in scores[row] if score >= 0]
        fields = {"prompt": "p", "responses": [*map(str, range(len(own)))], "scores": own}
        pairs += [(row, pair) for pair in pairs_of_list(fields, "here") if pair is not None]
    margin = torch.stack(
        [reward[r, int(p["response_2"])] - reward[r, int(p["response_1"])] for r, p in pairs]
    )
    label = torch.tensor([pair["y"] for _, pair in pairs])
    ends = torch.ones_like(label)
    loss = PreferenceLoss()(margin[:, None], label, 0 * ends, ends)
    # Each unordered pair stands twice in the formula, which leaves its mean as it is.
    assert 2 * len(pairs) == count
    assert abs(float(loss.double().mean() - total / count)) <= 1e-6


@pytest.mark.parametrize("weighting", ["last", "mean", "cumulative"])
def test_weights_in_fp64_are_those_of_the_formula(weighting: str) -> None:
    """Kernels are held against fp64; weights rounded to fp32 would hide 1e-7."""
    start, end = torch.tensor([0, 3, 2]), torch.tensor([7, 6, 2])
    made = token_weights(weighting, start, end, 9, torch.float64)
    assert made.dtype == torch.float64
    for row, (begin, stop) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
        n = stop - begin
        of = {
            "last": lambda t, n=n: float(t == n - 1),
            "mean": lambda t, n=n: 1 / n,
            "cumulative": lambda t, n=n: (t + 1) / (n * (n + 1) / 2),
        }[weighting]
        wanted = [of(t - begin) if begin <= t < stop else 0.0 for t in range(9)]
        assert made[row].tolist() == pytest.approx(wanted, rel=1e-15, abs=0)
    torch.testing.assert_close(made.float(), token_weights(weighting, start, end, 9))
