"""Buffers, block sizes and launches of the pair loss's Triton kernels; importing this file needs triton."""

from typing import NamedTuple

from torch import Tensor

from pal_ds.kernels.buffers import buffer, power_of_two, programs
from pal_ds.kernels.eager import PairLossOutput
from pal_ds.kernels.owners import owners
from pal_ds.kernels.pair_loss_triton import (
    LOSSES,
    WEIGHTINGS,
    multiply_kernel,
    pair_loss_kernel,
    shared_response_kernel,
    sum_parts_kernel,
)
from pal_ds.losses import PairFacts

POSITIONS_PER_PROGRAM = 32
"""Fixed, so that the order of a pair's sums is a property of the code."""
ELEMENTS_PER_BLOCK = 2048


class Blocks(NamedTuple):
    """Cut of the positions and columns of a launch, from T and d alone."""

    span: int
    """Positions of a pair that one program walks through."""
    positions: int
    """Positions it holds at once."""
    columns: int

    @property
    def num_warps(self) -> int:
        """More for large blocks, lest a thread's share leave its registers."""
        return 8 if self.positions * self.columns >= ELEMENTS_PER_BLOCK else 4


def blocks_for(num_positions: int, dim: int) -> Blocks:
    """The block sizes. A padded T does not change them, so it does not change a sum's order either."""
    columns = power_of_two(dim, least=16)
    if num_positions == 1:
        return Blocks(1, 1, columns)
    return Blocks(POSITIONS_PER_PROGRAM, min(16, max(1, ELEMENTS_PER_BLOCK // columns)), columns)


def launch(
    response: Tensor,
    point: Tensor,
    scale: Tensor | None,
    response_index: Tensor,
    facts: PairFacts,
    kind: str,
    weighting: str,
    gradients: bool,
) -> tuple[PairLossOutput, tuple[Tensor, Tensor, Tensor | None] | None]:
    """Runs the kernels: (losses, rewards and margins; gradients of the total in response, point and scale)."""
    response, point = response.detach().contiguous(), point.detach().contiguous()
    factor = point.new_ones(1) if scale is None else scale.detach()
    inputs = (response, response_index.contiguous(), point, factor.float())
    num_pairs, num_positions = len(point), response.shape[1]
    blocks = blocks_for(num_positions, response.shape[2])
    num_parts = -(-num_positions // blocks.span)
    loss = buffer(num_pairs, num_parts, 1, like=response)
    reward = buffer(num_pairs, 2, num_positions, like=response)
    margin = buffer(num_pairs, num_positions, like=response)
    made = _gradient_buffers(response, point, num_parts) if gradients else (loss,) * 4
    owned = owners(response_index, len(response)) if gradients else None
    programs(pair_loss_kernel, num_pairs, num_parts)(
        inputs,
        _for_kernel(facts),
        loss if owned is None else owned.uses,
        (loss, reward, margin),
        made,
        (num_positions, num_parts, response.shape[2]),
        cosine=scale is not None,
        points=point.shape[1],
        kinds=(LOSSES[kind], WEIGHTINGS[weighting]),
        gradients=gradients,
        blocks=tuple(blocks),
        num_warps=blocks.num_warps,
    )
    loss = sum_parts(loss)[:, 0]
    output = PairLossOutput((facts.weight.float() * loss).sum(), loss, reward, margin)
    if owned is None:
        return output, None
    slope, d_response, d_point, d_scale = made
    programs(shared_response_kernel, len(response), -(-num_positions // blocks.positions))(
        (response, point, inputs[3], slope),
        *owned,
        d_response,
        num_positions,
        response.shape[2],
        cosine=scale is not None,
        points=point.shape[1],
        block_t=blocks.positions,
        block_d=blocks.columns,
        num_warps=blocks.num_warps,
    )
    d_point = sum_parts(d_point).view(point.shape).to(point.dtype)
    return output, (
        d_response,
        d_point,
        None if scale is None else d_scale.sum().view(1).to(scale.dtype),
    )


def _gradient_buffers(
    response: Tensor, point: Tensor, num_parts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Buffers for d loss / d margin [B, T], d response [R, T, d], parts of d point and of d scale."""
    num_pairs = len(point)
    return (
        buffer(num_pairs, response.shape[1], like=response),
        buffer(*response.shape, like=response, dtype=response.dtype),
        buffer(num_pairs, num_parts, point.shape[1] * point.shape[2], like=response),
        buffer(num_pairs, num_parts, like=response),
    )


def _for_kernel(facts: PairFacts) -> tuple[Tensor, ...]:
    integers = [part.long().contiguous() for part in facts[:3]]
    floats = [part.float().contiguous() for part in (facts.required_margin, facts.weight)]
    return (*integers, *floats)


def sum_parts(parts: Tensor) -> Tensor:
    """[n, parts, width] fp32 -> [n, width], added in order: empty parts at the end change no bit."""
    num_rows, num_parts, width = parts.shape
    if num_parts == 1:
        return parts[:, 0]
    out = buffer(num_rows, width, like=parts)
    block = min(1024, power_of_two(width))
    programs(sum_parts_kernel, num_rows, -(-width // block))(
        parts, out, num_parts, width, block=block
    )
    return out


def multiply(values: Tensor, factor: Tensor) -> None:
    """values *= factor (a scalar on the device) in place; free where it is 1."""
    block = 1024
    programs(multiply_kernel, -(-values.numel() // block))(
        values, factor, values.numel(), block=block
    )
