"""The prototype mix against fp64: gather, softmax, mixture, and gradients for repeated users and prompts."""

import pytest
import torch
from torch import Tensor

from pal_ds.kernels.mix import mix, sum_owned
from tests.kernels.cases import check_errors

pytestmark = pytest.mark.usefixtures("interpreter")


def run(inputs: tuple[Tensor, ...], dtype: torch.dtype, implementation: str) -> dict[str, Tensor]:
    logits, user, prototypes, source, d_mixed, d_mixture = inputs
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = logits.clone().to(wide).requires_grad_()
    prototypes = prototypes.clone().to(dtype).requires_grad_()
    mixed, mixture = mix(logits, user, prototypes, source, 0.7, implementation)
    ((mixed * d_mixed).sum() + (mixture * d_mixture).sum()).backward()
    made = {"mixed": mixed, "mixture": mixture, "logits": logits.grad, "protos": prototypes.grad}
    return {name: value.detach() for name, value in made.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_users", "num_rows", "num_sources", "num_prototypes", "width"),
    [(3, 5, 1, 4, 24), (5, 4, 2, 1, 33), (2, 3, 2, 64, 70), (1, 1, 1, 3, 2048), (6, 9, 4, 7, 1)],
)
def test_against_fp64(
    num_users: int,
    num_rows: int,
    num_sources: int,
    num_prototypes: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    inputs = (
        3 * torch.randn(num_users, num_prototypes),
        torch.randint(num_users, (num_rows,)),
        torch.randn(num_sources, num_prototypes, width).to(dtype).float(),
        torch.randint(num_sources, (num_rows,)),
        torch.randn(num_rows, width),
        torch.randn(num_rows, num_prototypes),
    )
    kernel, eager = run(inputs, dtype, "triton"), run(inputs, dtype, "torch")
    check_errors(kernel, eager, run(inputs, torch.float64, "torch"))


def test_one_prototype_is_for_everyone() -> None:
    """K = 1: the mixture is exactly 1, the prototype comes out as it is, and users receive exactly 0."""
    logits = (50 * torch.randn(6, 1)).requires_grad_()
    prototypes = torch.randn(1, 1, 20)
    user = torch.arange(6)
    mixed, _ = mix(logits, user, prototypes, torch.zeros(6, dtype=torch.int64), 1.0, "triton")
    assert torch.equal(mixed, prototypes[:, 0].expand(6, -1))
    mixed.square().sum().backward()
    assert torch.equal(logits.grad, torch.zeros(6, 1))


def test_extreme_logits_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]]).requires_grad_()
    zero = torch.zeros(1, dtype=torch.int64)
    mixed, mixture = mix(logits, zero, torch.randn(1, 3, 8), zero, 1e-2, "triton")
    mixed.sum().backward()
    assert torch.equal(mixture, torch.tensor([[1.0, 0.0, 0.0]]))
    assert torch.equal(logits.grad, torch.zeros(1, 3))


def test_rows_of_an_owner_are_summed_in_their_order() -> None:
    """1e8 + 1 - 1e8 is 0 in fp32, 1e8 - 1e8 + 1 is 1."""
    rows = torch.tensor([[1e8], [5.0], [1.0], [-1e8], [1e8], [-1e8], [1.0]])
    owner = torch.tensor([2, 0, 2, 2, 3, 3, 3])
    summed = sum_owned(rows, owner, 5)
    assert torch.equal(summed, torch.tensor([[5.0], [0.0], [0.0], [1.0], [0.0]]))


def test_impossible_inputs_are_refused() -> None:
    zero = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match="3 wide for 4"):
        mix(torch.zeros(2, 3), zero, torch.zeros(1, 4, 8), zero)
    with pytest.raises(ValueError, match="must be"):
        mix(torch.zeros(2, 4), zero, torch.zeros(1, 4, 8), zero[:1])
