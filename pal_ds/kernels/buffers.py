"""Output buffers of kernels: uninitialised, for kernels write every element themselves (tests fill them with NaN)."""

import torch
from torch import Tensor


def buffer(*shape: int, like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uninitialised memory on the device of `like`."""
    return torch.empty(shape, dtype=dtype, device=like.device)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`: Triton's blocks have no other sizes."""
    return max(least, 1 << max(n - 1, 0).bit_length())
