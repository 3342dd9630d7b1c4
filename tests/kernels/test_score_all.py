"""All users x all items through the rank-K form: the kernel, plain torch, and what the rewards are by definition."""

import pytest
import torch

from pal_ds.kernels import eager
from pal_ds.kernels.score_all import score_all
from tests.kernels.cases import check_errors


def inputs(num_users: int, num_items: int, num_sources: int, num_prototypes: int, dim: int):
    mixture = (2 * torch.randn(num_users, num_prototypes)).softmax(-1)
    prototypes = torch.randn(num_sources, num_prototypes, dim) + 2.0
    return (
        mixture,
        torch.randn(num_items, dim),
        prototypes,
        torch.randint(num_sources, (num_items,)),
    )


@pytest.mark.parametrize("scale", [None, 5.0])
@pytest.mark.parametrize(
    "shape", [(3, 5, 1, 4, 24), (33, 65, 1, 64, 8), (2, 9, 3, 1, 2048), (40, 7, 4, 3, 17)]
)
def test_against_the_definition(
    interpreter: None, shape: tuple[int, ...], scale: float | None
) -> None:
    tensors = inputs(*shape)
    kernel = {"scores": score_all(*tensors, scale, "triton")}
    plain = {"scores": score_all(*tensors, scale)}
    wide = [x.double() if x.is_floating_point() else x for x in tensors]
    check_errors(kernel, plain, {"scores": eager.score_all(*wide, scale)})
    torch.testing.assert_close(plain["scores"], eager.score_all(*tensors, scale))


def test_bf16_items_are_scored_in_fp32(interpreter: None) -> None:
    mixture, response, prototypes, source = inputs(4, 6, 1, 3, 40)
    response, prototypes = response.bfloat16(), prototypes.bfloat16()
    made = score_all(mixture, response, prototypes, None, None, "triton")
    wanted = eager.score_all(mixture, response.double(), prototypes.double(), source, None)
    torch.testing.assert_close(made.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_an_item_at_a_users_point_scores_0_not_nan(
    request: pytest.FixtureRequest, implementation: str
) -> None:
    """Far from the centre the expansion cancels: the error is bounded as the module says."""
    if implementation == "triton":
        request.getfixturevalue("interpreter")
    prototypes = 100 * torch.randn(1, 4, 16)
    made = score_all(torch.eye(4), prototypes[0], prototypes, None, None, implementation)
    centred = (prototypes[0] - prototypes[0].mean(0)).norm(dim=-1)
    assert bool((made.diagonal() <= 0).all())
    assert bool((made.diagonal() >= -2e-3 * centred).all())


def test_zero_vectors_score_0(interpreter: None) -> None:
    mixture, response, prototypes, _ = inputs(3, 4, 1, 2, 8)
    response[1] = 0.0
    made = score_all(mixture, response, prototypes, None, 5.0, "triton")
    assert torch.equal(made[:, 1], torch.zeros(3))
    made = score_all(mixture, response, torch.zeros(1, 2, 8), None, 5.0, "triton")
    assert torch.equal(made, torch.zeros(3, 4))


def test_sets_of_prototypes_need_a_source() -> None:
    mixture, response, prototypes, _ = inputs(3, 4, 2, 2, 8)
    with pytest.raises(ValueError, match="source must name"):
        score_all(mixture, response, prototypes)
