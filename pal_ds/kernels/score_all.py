"""Every user's reward for every item through the rank-K form: N K d + U N K operations instead of U N d.

A user's point is a = sum_k s_uk p_k (PAL-A with `Pw` or `f(P)w`; PAL-B with p_k the K maps of the item's prompt;
arXiv 2406.08469), and sum_k s_uk = 1. So with a centre c, the mean prototype,
    -||z - a||   = -sqrt(|z - c|^2 - 2 sum_k s_uk <z - c, p_k - c> + s_u^T G s_u)     G_kl = <p_k - c, p_l - c>
    scale cos(z, a) = scale sum_k s_uk <z, p_k> / (|z| sqrt(s_u^T G s_u))              G_kl = <p_k, p_l>
The expansion cancels where z is much closer to a than to c: an error of about 1e-7 |z - c|^2 in the square, so
sqrt(1e-7) |z - c| at worst. `f(Pw)` has points of rank above K: score those as one dense product. No gradients.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pal_ds.kernels import eager
from pal_ds.kernels.buffers import buffer, power_of_two, programs
from pal_ds.kernels.dispatch import Implementation, choose, compiled

BLOCK_USERS, BLOCK_ITEMS = 32, 64


@torch.no_grad()
def score_all(
    mixture: Float[Tensor, "U K"],
    response: Float[Tensor, "N d"],
    prototypes: Float[Tensor, "Q K d"],
    source: Int[Tensor, "N"] | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Tensor, "U N"]:
    """Rewards in fp32: minus distances, or cosines times `scale` where it is given.

    `source` names the set of prototypes of each item (PAL-B: its prompt); unset, all items share the only one. What
    is not on the Triton path uses the same rank-K form in torch.
    """
    if source is None:
        if len(prototypes) != 1:
            raise ValueError(f"{len(prototypes)} sets of prototypes: source must name each item's.")
        source = torch.zeros(len(response), dtype=torch.int64, device=response.device)
    sizes = {"K": prototypes.shape[1]}
    chosen = choose("score_all", response, sizes, implementation)
    statistics = Statistics(response, prototypes, source, scale)
    if chosen == "triton":
        return _launch(mixture, statistics)
    function = statistics_to_scores if chosen == "torch" else compiled(statistics_to_scores)
    return function(mixture, statistics)


class Statistics:
    """K numbers per item and K^2 per set of prototypes: all that the scores need, fp32 (fp64 from fp64)."""

    def __init__(
        self,
        response: Float[Tensor, "N d"],
        prototypes: Float[Tensor, "Q K d"],
        source: Int[Tensor, "N"],
        scale: float | None,
    ):
        dtype = eager.working_dtype(response, prototypes)
        response, prototypes = response.to(dtype), prototypes.to(dtype)
        self.source, self.cosine = source.contiguous(), scale is not None
        if scale is None:
            centre = prototypes.mean(1)
            prototypes = prototypes - centre[:, None]
            response = response - centre[source]
        square = response.square().sum(-1)
        self.gram = prototypes @ prototypes.mT
        if len(prototypes) == 1:
            self.dots = response @ prototypes[0].T
        else:
            self.dots = torch.einsum("nd,nkd->nk", response, prototypes[source])
        self.item = square
        if scale is not None:
            safe = torch.where(square > 0, square, 1.0)
            self.item = torch.where(square > 0, scale * safe.rsqrt(), 0.0)


def statistics_to_scores(mixture: Float[Tensor, "U K"], from_items: Statistics) -> Tensor:
    """The rank-K form in plain torch, [U, N]; one product for all of it where the items share their prototypes."""
    s, dots, item = mixture.to(from_items.dots.dtype), from_items.dots, from_items.item
    squares = torch.stack([((s @ gram) * s).sum(-1) for gram in from_items.gram], 1)
    if from_items.cosine:
        safe = torch.where(squares > 0, squares, 1.0)
        inverse = torch.where(squares > 0, safe.rsqrt(), 0.0)
        if len(from_items.gram) == 1:
            return (s * inverse) @ (dots * item[:, None]).T
        return (s @ dots.T) * item * inverse[:, from_items.source]
    if len(from_items.gram) == 1:
        left = torch.cat([s, squares, torch.ones_like(squares)], 1)
        right = torch.cat([-2 * dots, torch.ones_like(item)[:, None], item[:, None]], 1)
        apart = left @ right.T
    else:
        apart = item - 2 * (s @ dots.T) + squares[:, from_items.source]
    return apart.clamp_(min=0).sqrt_().neg_()


def _launch(mixture: Tensor, from_items: Statistics) -> Tensor:
    from pal_ds.kernels import score_all_triton as kernels

    mixture = mixture.float().contiguous()
    num_users, num_prototypes = mixture.shape
    num_items, num_sources = len(from_items.dots), len(from_items.gram)
    squares = buffer(num_users, num_sources, like=mixture)
    user_blocks = -(-num_users // BLOCK_USERS)
    programs(kernels.squares_kernel, user_blocks * num_sources)(
        mixture,
        from_items.gram.contiguous(),
        squares,
        num_users,
        num_sources,
        num_prototypes,
        block_u=BLOCK_USERS,
        block_k=power_of_two(num_prototypes),
    )
    out = buffer(num_users, num_items, like=mixture)
    programs(kernels.score_all_kernel, user_blocks * -(-num_items // BLOCK_ITEMS))(
        mixture,
        from_items.dots.contiguous(),
        from_items.item,
        squares,
        from_items.source,
        out,
        num_users,
        num_items,
        num_sources,
        num_prototypes,
        cosine=from_items.cosine,
        block_u=BLOCK_USERS,
        block_n=BLOCK_ITEMS,
    )
    return out
