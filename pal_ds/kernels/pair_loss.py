"""The loss of comparisons by distance or cosine, with its gradients made in the forward pass.

For comparison p of user u with responses z_0, z_1 at positions t of its window [start, end), a the user's point
(PAL-A: one for both responses; PAL-B: z_u of each response's prompt; arXiv 2406.08469),
    reward_i = -||z_i - a_i||_2  or  scale * cos(z_i, a_i)        margin = reward_1 - reward_0
    loss_p = sum_t weight_t * l(label * margin_t - required)      total = sum_p weight_p * loss_p
with l and weight_t as in `losses.py`. Derivatives, with g_t = weight_p * weight_t * label * l', and ^ for x / |x|:
    distance  d z_i = -+ g_t (z_i - a_i) / ||z_i - a_i||       d a_i = -sum_t d z_i        (0 where they coincide)
    cosine    d z_i = +- g_t scale / |z_i| (a^ - cos z_i^)     d a_i = (I - a^ a^T) sum_t +- g_t scale z_i^ / |a|
Each response is read once and its gradient written once: 8 T d bytes in bf16 against about 48 of eager torch. A
response of several comparisons is read once more, by a program that sums over them in their order. Nothing is
atomic; a pair's numbers depend on neither the other pairs nor the padding. Rows of T are cut in spans of a fixed
length, whose sums are added in order.
"""

from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pal_ds.kernels import eager
from pal_ds.kernels.dispatch import Implementation, choose, compiled
from pal_ds.kernels.eager import PairLossOutput
from pal_ds.losses import LossKind, PairFacts, TokenWeighting


def pair_loss(
    response: Float[Tensor, "R T d"],
    response_index: Int[Tensor, "B 2"],
    point: Float[Tensor, "B g d"],
    facts: PairFacts,
    scale: Float[Tensor, "1"] | None = None,
    kind: LossKind = "logistic",
    weighting: TokenWeighting = "last",
    implementation: Implementation | None = None,
) -> PairLossOutput:
    """Compute the loss of B comparisons of R distinct responses; gradients reach response, point and scale.

    `point` holds one row per comparison (g = 1) or one per response (g = 2). With `scale` the reward is a scaled
    cosine, without it minus the distance. What lies outside a window, or has token weight 0, is not read. The
    total is a scalar and its gradient normally 1: put every factor into `facts.weight`, any other gradient costs
    another pass. Raises ValueError for shapes or choices that do not fit.
    """
    _check(response, response_index, point, facts, kind, weighting)
    chosen = choose("pair_loss", response, {"d": response.shape[-1]}, implementation)
    if chosen == "triton":
        return PairLossOutput(
            *_PairLoss.apply(response, point, scale, response_index, facts, kind, weighting)
        )
    plain = eager.pair_loss if chosen == "torch" else compiled(eager.pair_loss)
    return plain(response, response_index, point, scale, facts, kind, weighting)


class _PairLoss(torch.autograd.Function):
    """The Triton path. All gradients exist after forward; backward multiplies them where it must."""

    @staticmethod
    def forward(
        ctx: Any,
        response: Tensor,
        point: Tensor,
        scale: Tensor | None,
        response_index: Tensor,
        facts: PairFacts,
        kind: str,
        weighting: str,
    ) -> tuple[Tensor, ...]:
        wanted = any(ctx.needs_input_grad[:3])
        from pal_ds.kernels.pair_loss_launch import launch

        output, gradients = launch(
            response, point, scale, response_index, facts, kind, weighting, wanted
        )
        ctx.gradients = gradients
        ctx.mark_non_differentiable(output.loss, output.reward, output.margin)
        return tuple(output)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *upstream: Tensor
    ) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "backward through the pair loss a second time: its gradients are made in the forward "
                "pass and handed out once; run the forward pass again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        from pal_ds.kernels.pair_loss_launch import multiply

        for gradient in gradients:
            if gradient is not None:
                multiply(gradient, upstream[0])
        return *gradients, None, None, None, None


def _check(
    response: Tensor,
    response_index: Tensor,
    point: Tensor,
    facts: PairFacts,
    kind: str,
    weighting: str,
) -> None:
    num_pairs, dim = response_index.shape[0], response.shape[-1]
    if response_index.shape != (num_pairs, 2):
        raise ValueError(f"response_index is {tuple(response_index.shape)}; it must be [B, 2].")
    if point.shape not in ((num_pairs, 1, dim), (num_pairs, 2, dim)):
        raise ValueError(
            f"point is {tuple(point.shape)}; it must be [{num_pairs}, 1 or 2, {dim}]: one row per "
            "comparison, or one per response."
        )
    if facts.target is not None:
        raise ValueError("facts.target is given; this loss knows sure labels, -1 and +1, alone.")
    for name, fact in zip(facts._fields, facts, strict=True):
        if fact is not None and fact.shape != (num_pairs,):
            raise ValueError(f"{name} is {tuple(fact.shape)}; it must be [{num_pairs}].")
    for name, value, known in (("kind", kind, LossKind), ("weighting", weighting, TokenWeighting)):
        if value not in get_args(known):
            raise ValueError(
                f"{name} is {value!r}; it must be one of {', '.join(get_args(known))}."
            )
