"""PAL-B's collapse is exact, in value and in every gradient, and makes no tensor [n, K, d]."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pal_ds.kernels.collapse import mixed_linear, mixed_linear_reference


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("n", "k", "e", "d"), [(5, 3, 7, 11), (1, 1, 4, 4), (2, 64, 3, 5)])
def test_value_and_gradients_in_fp64(n: int, k: int, e: int, d: int, shared: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((n, e) if shared else (n, k, e), (n, k), (k, d, e), (k, d))
    leaves = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    leaves[1] = leaves[1].softmax(-1)
    upstream = torch.randn(n, d, generator=generator, dtype=torch.float64)
    made = []
    for function in (mixed_linear, mixed_linear_reference):
        copies = [leaf.clone().requires_grad_() for leaf in leaves]
        out = function(*copies)
        made.append([out, *torch.autograd.grad(out, copies, upstream)])
    for collapsed, defined in zip(*made, strict=True):
        torch.testing.assert_close(collapsed, defined, rtol=1e-12, atol=1e-12)


def test_no_result_of_every_map_exists() -> None:
    n, k, e, d = 6, 4, 5, 9
    sizes: list[int] = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in (out,) if isinstance(x, torch.Tensor))
            return out

    tensors = torch.randn(n, k, e), torch.randn(n, k), torch.randn(k, d, e), torch.randn(k, d)
    with Sizes():
        mixed_linear(*tensors)
    assert n * k * d not in sizes
    with Sizes():
        mixed_linear_reference(*tensors)
    assert n * k * d in sizes
