"""Vector operations that heads share: rows by index, unit vectors, distances, the cosine scale.

Everything is fp32 whatever the model's dtype, and finite with zero gradient at the zero vector.
"""

import math

import torch
from torch import Tensor, nn

from .jaxtyping_fallback import Float, Int

INITIAL_LOG_SCALE = math.log(1 / 0.07)
"""Start of the learned cosine scale, as in CLIP (arXiv 2103.00020, 2.5) and the PAL reference."""
LARGEST_SCALE = 100.0


def take(table: Float[Tensor, "R *item"], index: Int[Tensor, "B *n"]) -> Float[Tensor, "B *n_item"]:
    """Rows of `table` by `index`; a row taken many times sums its gradients in a fixed order.

    Indexing and `gather` add with atomics on some devices; an embedding's backward does not.
    """
    rows = nn.functional.embedding(index, table.flatten(1))
    return rows.unflatten(-1, table.shape[1:])


def unit(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
    """x / ||x||_2 in fp32; the zero vector stays zero and receives no gradient.

    >>> [[round(number, 4) for number in row] for row in unit(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()]
    [[0.6, 0.8], [0.0, 0.0]]
    """
    x = x.float()
    square = x.square().sum(-1, keepdim=True)
    # The inner choice keeps rsqrt finite, the outer one drops its gradient: one alone leaves 0 * inf.
    safe = torch.where(square > 0, square, 1.0)
    return x * torch.where(square > 0, safe.rsqrt(), 0.0)


def distance(
    x: Float[Tensor, "*batch d"], y: Float[Tensor, "*#batch d"]
) -> Float[Tensor, "*batch"]:
    """||x - y||_2 in fp32, the square not expanded (it cancels); gradient 0 at x = y.

    >>> round(distance(torch.tensor([3.0, 4.0]), torch.zeros(2)).item(), 4)
    5.0
    """
    return torch.linalg.vector_norm(x.float() - y.float(), dim=-1)


def new_log_scale() -> nn.Parameter:
    """A fresh learned log scale t; shape [1], for partitioned training wants an axis."""
    return nn.Parameter(torch.tensor([INITIAL_LOG_SCALE]))


def bounded_scale(log_scale: Float[Tensor, "1"]) -> Float[Tensor, "1"]:
    """min(exp(t), 100) in fp32; a large t cannot overflow, and has no gradient above the bound."""
    return log_scale.float().clamp(max=math.log(LARGEST_SCALE)).exp()
