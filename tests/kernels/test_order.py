"""What a sequential interpreter would hide: every element written exactly once, and the order of programs is free."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pal_ds.kernels.mix import mix
from pal_ds.kernels.score_all import score_all
from tests.kernels.cases import comparisons, same_bits

pytestmark = pytest.mark.usefixtures("interpreter")


def output(cosine: bool, num_responses: int | None) -> dict[str, Tensor]:
    """More than one span of positions, responses used never, once and often."""
    case = comparisons(
        4, 37, 12, cosine=cosine, points=1 + cosine, num_responses=num_responses, seed=3
    )
    return case.compute("logistic", "mean", "triton")


def mixed(num_sources: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 5, generator=generator).requires_grad_()
    # Wider than one program's block of columns.
    prototypes = torch.randn(num_sources, 5, 600, generator=generator).requires_grad_()
    user = torch.tensor([3, 1, 3, 3, 0, 1])
    source = torch.arange(6) % max(num_sources - 1, 1)
    out, mixture = mix(logits, user, prototypes, source, 0.5, "triton")
    (out.square().sum() + mixture[:, 0].sum()).backward()
    made = {"out": out, "mixture": mixture, "logits": logits.grad, "prototypes": prototypes.grad}
    return {name: value.detach() for name, value in made.items()}


def scored(num_sources: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    mixture = torch.rand(35, 3, generator=generator).softmax(-1)
    response = torch.randn(66, 8, generator=generator)
    prototypes = torch.randn(num_sources, 3, 8, generator=generator)
    scale = None if num_sources == 1 else 4.0
    source = torch.arange(66) % num_sources
    return {"scores": score_all(mixture, response, prototypes, source, scale, "triton")}


OPERATIONS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "distance": lambda: output(False, None),
    "distance, shared": lambda: output(False, 5),
    "cosine": lambda: output(True, None),
    "cosine, shared": lambda: output(True, 5),
    "mix, one set": lambda: mixed(1),
    "mix, sets": lambda: mixed(4),
    "score, one set": lambda: scored(1),
    "score, sets": lambda: scored(5),
}
every_operation = pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())


@every_operation
def test_every_element_is_written_exactly_once(
    operation: Callable[[], dict[str, Tensor]], poisoned: None, writes: dict[int, int]
) -> None:
    made = operation()
    assert set(writes.values()) == {1}, "an address was stored to more than once"
    assert all(bool(value.isfinite().all()) for value in made.values())


@every_operation
def test_the_order_of_programs_is_free_and_runs_repeat(
    operation: Callable[[], dict[str, Tensor]], shuffled: Callable[[int], None]
) -> None:
    usual = operation()
    assert same_bits(operation(), usual)
    shuffled(1)
    assert same_bits(operation(), usual)
    shuffled(0)
