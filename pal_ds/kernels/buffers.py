"""Common parts of launches: output buffers, block sizes, grids.

Buffers are uninitialised, for kernels write every element themselves; tests fill them with NaN.
"""

from typing import Any

import torch
from torch import Tensor


def buffer(*shape: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised memory on the device of `like`."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`: Triton's blocks have no other sizes."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def programs(kernel: Any, *grid: int) -> Any:
    """The kernel as a function that runs `grid` programs; the type of `kernel[grid]` is Triton's own affair."""
    return kernel[grid]
