"""Copies of a packed row's tokens, for keys that several sequences look at; gradients are added in a fixed order."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pal_ds.data.packing import Packing
from pal_ds.heads.jaxtyping_fallback import Float, Int


class Gather(NamedTuple):
    """Copies of tokens and their places; gradients find their way back without atomics."""

    token: Int[Tensor, "n"]
    """Token of each copy."""
    first_copy: Int[Tensor, "S"]
    """A copy of each token; every token has one."""
    more_copies: Int[Tensor, "T M"]
    """Further copies of the first T tokens, n where there are no more."""


def owner_and_column(packing: Packing) -> tuple[Int[Tensor, "S"], Int[Tensor, "S"]]:
    """Compute the sequence that each token belongs to, and its place in it."""
    start = packing.sequence_start
    num_tokens = packing.position_ids.shape[1]
    sequences = torch.arange(len(start) - 1, device=start.device)
    # With its size given, the device is not waited for.
    owner = torch.repeat_interleave(sequences, start.diff(), output_size=num_tokens)
    return owner, torch.arange(num_tokens, device=start.device) - start[owner]


def shared_copies(
    packing: Packing,
    owner: Int[Tensor, "S"],
    column: Int[Tensor, "S"],
    keys_start: Int[Tensor, "R"],
    num_copies: int,
) -> Int[Tensor, "T M"]:
    """Place each prompt token among the keys of each response of its prompt, which begin at `keys_start`."""
    num_tokens = packing.num_prompt_tokens
    responses = packing.responses_of_prompt[owner[:num_tokens]]
    copies = keys_start[responses.clamp(min=0)] + column[:num_tokens, None]
    return torch.where(responses < 0, num_copies, copies)


class _Copies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token: Tensor, first_copy: Tensor, more_copies: Tensor
    ) -> Tensor:
        ctx.save_for_backward(first_copy, more_copies)
        return x.index_select(1, token)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = gradients
        first_copy, more_copies = ctx.saved_tensors
        total = gradient.index_select(1, first_copy)
        num_tokens, num_more = more_copies.shape
        if num_more:
            # In fp32: with many responses to one prompt the sum is longer than bf16 can hold.
            padded = torch.cat([gradient, gradient.new_zeros(gradient[:, :1].shape)], dim=1)
            shared = total[:, :num_tokens].float()
            for column in range(num_more):
                shared += padded.index_select(1, more_copies[:, column])
            total[:, :num_tokens] = shared
        return total, None, None, None


def copies(x: Float[Tensor, "h S D"], gather: Gather) -> Float[Tensor, "h n D"]:
    """x[:, gather.token]; the gradients of a token's copies are added in a fixed order, without atomics."""
    return _Copies.apply(x, *gather)  # pyright: ignore[reportReturnType]
