"""User gather, softmax and prototype mix in one kernel: from logits to the mixed prototype of each row.

    s_n = softmax(logits[user_n] / temperature)        mixed_n = sum_k s_nk prototypes[source_n, k]
PAL-A mixes one set of prototypes (Q = 1; arXiv 2406.08469, `f(Pw)`, `f(P)w` and `Pw`), PAL-B one set per prompt: its
K maps of the distinct prompts, [Q, K, d]. The rows' prototypes are never gathered: no [n, K, h] exists. Backward
    d s_nk = <d mixed_n, p_k>      d logits = s (d s - <s, d s>) / temperature      d p_qk = sum_n s_nk d mixed_n
sums over the rows of a user, and of a source, in their order.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pal_ds.kernels import eager
from pal_ds.kernels.buffers import buffer, power_of_two, programs
from pal_ds.kernels.dispatch import Implementation, choose, compiled
from pal_ds.kernels.owners import owners

ELEMENTS_PER_BLOCK = 4096


def mix(
    logits: Float[Tensor, "U K"],
    user: Int[Tensor, "n"],
    prototypes: Float[Tensor, "Q K h"],
    source: Int[Tensor, "n"],
    temperature: float = 1.0,
    implementation: Implementation | None = None,
) -> tuple[Float[Tensor, "n h"], Float[Tensor, "n K"]]:
    """(mixed prototypes, mixtures) of n rows, fp32; gradients reach logits and prototypes.

    `user` and `source`, int64, name the row of logits and the set of prototypes. Raises ValueError for shapes that do
    not fit.
    """
    num_prototypes, width = prototypes.shape[1:]
    if logits.shape[1] != num_prototypes:
        raise ValueError(f"logits are {logits.shape[1]} wide for {num_prototypes} prototypes.")
    if user.shape != source.shape or user.dim() != 1:
        raise ValueError(f"user {tuple(user.shape)} and source {tuple(source.shape)} must be [n].")
    sizes = {"K": num_prototypes, "h": width}
    chosen = choose("mix", prototypes, sizes, implementation)
    if chosen == "triton":
        return _Mix.apply(logits, prototypes, user, source, temperature)
    function = eager.mix if chosen == "torch" else compiled(eager.mix)
    return function(logits, user, prototypes, source, temperature)


class _Mix(torch.autograd.Function):
    """The Triton path."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        prototypes: Tensor,
        user: Tensor,
        source: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        from pal_ds.kernels import mix_triton as kernels

        logits, prototypes = logits.contiguous(), prototypes.contiguous()
        num_prototypes, width = prototypes.shape[1:]
        mixed = buffer(len(user), width, like=prototypes)
        mixture = buffer(len(user), num_prototypes, like=prototypes)
        block_k, block_h = _blocks(num_prototypes, width)
        programs(kernels.mix_kernel, len(user), -(-width // block_h))(
            logits,
            user.contiguous(),
            prototypes,
            source.contiguous(),
            mixed,
            mixture,
            temperature,
            num_prototypes,
            width,
            block_k=block_k,
            block_h=block_h,
        )
        ctx.save_for_backward(mixture, prototypes, user, source)
        ctx.temperature, ctx.num_users, ctx.logits_dtype = temperature, len(logits), logits.dtype
        return mixed, mixture

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, d_mixed: Tensor, d_mixture: Tensor
    ) -> tuple[Tensor | None, ...]:
        mixture, prototypes, user, source = ctx.saved_tensors
        d_mixed = d_mixed.contiguous()
        d_logits = d_prototypes = None
        if ctx.needs_input_grad[0]:
            rows = _logits_gradient(
                mixture, prototypes, source, d_mixed, d_mixture.contiguous(), ctx.temperature
            )
            d_logits = sum_owned(rows, user, ctx.num_users).to(ctx.logits_dtype)
        if ctx.needs_input_grad[1]:
            d_prototypes = _prototypes_gradient(mixture, prototypes, source, d_mixed)
        return d_logits, d_prototypes, None, None, None


def _logits_gradient(
    mixture: Tensor,
    prototypes: Tensor,
    source: Tensor,
    d_mixed: Tensor,
    d_mixture: Tensor,
    temperature: float,
) -> Float[Tensor, "n K"]:
    from pal_ds.kernels import mix_triton as kernels

    num_prototypes, width = prototypes.shape[1:]
    block_k, block_h = _blocks(num_prototypes, width)
    out = buffer(*mixture.shape, like=mixture)
    programs(kernels.mix_logits_backward_kernel, len(mixture))(
        mixture,
        prototypes,
        source.contiguous(),
        d_mixed,
        d_mixture,
        out,
        temperature,
        num_prototypes,
        width,
        block_k=block_k,
        block_h=block_h,
    )
    return out


def _prototypes_gradient(
    mixture: Tensor, prototypes: Tensor, source: Tensor, d_mixed: Tensor
) -> Float[Tensor, "Q K h"]:
    from pal_ds.kernels import mix_triton as kernels

    num_sources, num_prototypes, width = prototypes.shape
    if num_sources == 1:
        # All rows share the set: one GEMM, where a program per set would walk through all rows.
        return (mixture.T @ d_mixed.float()).to(prototypes.dtype)[None]
    block_k, block_h = _blocks(num_prototypes, width)
    out = buffer(*prototypes.shape, like=prototypes, dtype=prototypes.dtype)
    programs(kernels.mix_prototypes_backward_kernel, num_sources, -(-width // block_h))(
        mixture,
        d_mixed,
        *owners(source, num_sources),
        out,
        num_prototypes,
        width,
        block_k=block_k,
        block_h=block_h,
    )
    return out


def sum_owned(
    rows: Float[Tensor, "n K"], owner: Int[Tensor, "n"], num_owners: int
) -> Float[Tensor, "U K"]:
    """Sum of the rows of each owner, in their order, without atomics; zeros for who owns none."""
    from pal_ds.kernels import mix_triton as kernels

    width = rows.shape[1]
    out = buffer(num_owners, width, like=rows)
    programs(kernels.sum_owned_kernel, num_owners)(
        rows, *owners(owner, num_owners), out, width, block=power_of_two(width)
    )
    return out


def _blocks(num_prototypes: int, width: int) -> tuple[int, int]:
    """(prototypes, columns) of a program, from the sizes alone."""
    block_k = power_of_two(num_prototypes)
    return block_k, min(power_of_two(width, least=16), ELEMENTS_PER_BLOCK // block_k)
