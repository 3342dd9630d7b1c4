"""The fused pair loss against fp64: every similarity, loss and weighting, ragged and extreme shapes, bf16 and fp32."""

from itertools import product

import pytest
import torch

from pal_ds.kernels.pair_loss import pair_loss
from pal_ds.losses import PairFacts
from tests.kernels.cases import Comparisons, check_errors, comparisons, same_bits

pytestmark = pytest.mark.usefixtures("interpreter")
LOSSES, WEIGHTINGS = ("logistic", "hinge", "smooth_hinge"), ("last", "mean", "cumulative")
# One after the other, so that every pair of choices occurs somewhere without the whole product.
CHOICES = [
    (cosine, kind, weighting, 1 + i % 2, (torch.float32, torch.bfloat16)[i // 2 % 2])
    for i, (cosine, kind, weighting) in enumerate(product((False, True), LOSSES, WEIGHTINGS))
]


def check(case: Comparisons, kind: str = "logistic", weighting: str = "cumulative") -> None:
    kernel = case.compute(kind, weighting, "triton")
    eager = case.compute(kind, weighting, "torch")
    check_errors(kernel, eager, case.to(torch.float64).compute(kind, weighting, "torch"))


@pytest.mark.parametrize(("cosine", "kind", "weighting", "points", "dtype"), CHOICES)
def test_every_choice(
    cosine: bool, kind: str, weighting: str, points: int, dtype: torch.dtype
) -> None:
    shape = {"cosine": cosine, "points": points, "num_responses": 5, "dtype": dtype}
    check(comparisons(4, 6, 24, **shape), kind, weighting)


@pytest.mark.parametrize(
    ("num_pairs", "num_positions", "dim"),
    [(1, 1, 1), (6, 1, 96), (2, 1, 2048), (1, 3, 1536), (2, 70, 33), (3, 16, 17), (3, 17, 64)],
)
@pytest.mark.parametrize("cosine", [False, True])
def test_shapes(num_pairs: int, num_positions: int, dim: int, cosine: bool) -> None:
    check(comparisons(num_pairs, num_positions, dim, cosine=cosine, points=1 + dim % 2))


@pytest.mark.parametrize("cosine", [False, True])
def test_a_response_of_all_comparisons_and_one_against_itself(cosine: bool) -> None:
    case = comparisons(5, 3, 12, cosine=cosine, num_responses=4)
    case.index = torch.tensor([[0, 1], [1, 0], [0, 0], [2, 0], [0, 1]])
    check(case)
    assert bool((case.compute("hinge", "mean", "triton")["d_response"][3] == 0).all())


@pytest.mark.parametrize("cosine", [False, True])
def test_zero_vectors_and_coinciding_ones_have_no_gradient(cosine: bool) -> None:
    case = comparisons(3, 2, 8, cosine=cosine)
    case.facts.start.zero_(), case.facts.end.fill_(2)
    case.response[case.index[0, 0]] = 0.0
    case.point[0] = 0.0
    case.response[case.index[1, 1]] = case.point[1, 0]
    check(case)


def test_the_kink_of_the_hinge_has_the_derivative_of_relu() -> None:
    """Margin exactly 1, in which the two responses differ by distance 2 and 1."""
    response = torch.tensor([[[2.0, 0.0]], [[1.0, 0.0]]])
    one, zero = torch.ones(1), torch.zeros(1)
    facts = PairFacts(one.long(), zero.long(), one.long(), zero, one)
    case = Comparisons(response, torch.tensor([[0, 1]]), torch.zeros(1, 1, 2), facts)
    made = case.compute("hinge", "last", "triton")
    assert made["margin"].item() == 1.0 and made["loss"].item() == 0.0
    assert bool((made["d_response"] == 0).all())
    check(case, "hinge", "last")


@pytest.mark.parametrize("cosine", [False, True])
def test_what_does_not_count_is_not_read(cosine: bool) -> None:
    """NaN outside the windows and in responses that nobody judges changes nothing and yields gradient 0."""
    case = comparisons(3, 9, 8, cosine=cosine)
    clean = case.compute("logistic", "mean", "triton")
    outside = torch.ones(6, 9, dtype=torch.bool)
    for pair in range(3):
        outside[case.index[pair], case.facts.start[pair] : case.facts.end[pair]] = False
    case.response[outside] = float("nan")
    made = case.compute("logistic", "mean", "triton")
    assert same_bits(made, clean)
    assert bool((made["d_response"][outside] == 0).all())
    check_errors(made, case.compute("logistic", "mean", "torch"), clean)


def test_large_margins_neither_overflow_nor_vanish() -> None:
    case = comparisons(2, 1, 4)
    case.facts.label.copy_(torch.tensor([1, -1]))
    case.response.mul_(torch.tensor([1e4, 1.0, 3e4, 2.0])[:, None, None])
    case.facts.required_margin.zero_()
    check(case, "logistic", "last")
    check(case, "hinge", "last")


def test_the_loss_of_a_large_right_margin_keeps_its_digits() -> None:
    """log(1 + exp(-20)) is 2e-9: lost where 1 + x is rounded first."""
    case = comparisons(1, 1, 2)
    case.response[case.index[0], 0] = torch.tensor([[25.0, 0.0], [5.0, 0.0]])
    case.point.zero_(), case.facts.required_margin.zero_(), case.facts.label.fill_(1)
    made, wanted = (
        case.to(dtype).compute("logistic", "last", implementation)
        for dtype, implementation in ((torch.float32, "triton"), (torch.float64, "torch"))
    )
    torch.testing.assert_close(made["loss"].double(), wanted["loss"], rtol=1e-5, atol=0)


def test_a_pair_depends_on_neither_its_company_nor_the_padding() -> None:
    """The bits of one comparison alone are its bits in a batch that is padded further."""
    case = comparisons(5, 40, 20, cosine=True, points=2)
    pair, longest = 3, int(case.facts.end[3])
    alone = Comparisons(
        case.response[case.index[pair], : max(longest, 2)].clone(),
        torch.tensor([[0, 1]]),
        case.point[pair : pair + 1],
        PairFacts._make(None if part is None else part[pair : pair + 1] for part in case.facts),
        case.scale,
    )
    whole = case.compute("logistic", "cumulative", "triton")
    made = alone.compute("logistic", "cumulative", "triton")
    for name in ("loss", "d_point"):
        assert torch.equal(made[name][0], whole[name][pair]), name
    length = made["margin"].shape[1]
    assert torch.equal(made["margin"][0], whole["margin"][pair, :length])
    assert torch.equal(made["d_response"], whole["d_response"][case.index[pair], :length])


def test_forward_without_gradients_makes_none() -> None:
    case = comparisons(3, 5, 8)
    with torch.no_grad():
        output = pair_loss(
            response=case.response,
            response_index=case.index,
            point=case.point,
            facts=case.facts,
            implementation="triton",
        )
    wanted = case.compute("logistic", "last", "triton")
    assert torch.equal(output.margin, wanted["margin"]) and not output.total.requires_grad


def test_upstream_factors_and_a_second_backward() -> None:
    """A gradient other than 1 multiplies; the gradients are handed out once."""
    case = comparisons(3, 5, 8, cosine=True, num_responses=4)
    plain = case.compute("logistic", "mean", "triton")
    leaves = [case.response.clone(), case.point.clone(), case.scale.clone()]
    for leaf in leaves:
        leaf.requires_grad_()
    output = pair_loss(
        response=leaves[0],
        response_index=case.index,
        point=leaves[1],
        facts=case.facts,
        scale=leaves[2],
        kind="logistic",
        weighting="mean",
        implementation="triton",
    )
    (2.5 * output.total).backward(retain_graph=True)
    for leaf, name in zip(leaves, ("d_response", "d_point", "d_scale"), strict=True):
        torch.testing.assert_close(leaf.grad, 2.5 * plain[name], rtol=1e-6, atol=0)
    assert not (output.loss.requires_grad or output.margin.requires_grad)
    with pytest.raises(RuntimeError, match="second time"):
        output.total.backward()


def test_impossible_inputs_are_refused() -> None:
    case = comparisons(3, 5, 8)
    with pytest.raises(ValueError, match="point is"):
        pair_loss(case.response, case.index, case.point[:, 0], case.facts)
    with pytest.raises(ValueError, match="kind is 'square'"):
        pair_loss(case.response, case.index, case.point, case.facts, kind="square")
    with pytest.raises(ValueError, match=r"weight is \(2,\)"):
        facts = case.facts._replace(weight=torch.ones(2))
        pair_loss(case.response, case.index, case.point, facts)
    with pytest.raises(ValueError, match="fp32"):
        wide = case.to(torch.float64)
        pair_loss(wide.response, wide.index, wide.point, wide.facts, implementation="triton")
