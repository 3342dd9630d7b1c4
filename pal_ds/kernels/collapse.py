"""PAL-B's last layer and mixture as one product, exactly: sum_k s_k (W_k h_k + b_k) without the K results.

    [s_1 h_1, .., s_K h_K] @ vstack(W_1^T, .., W_K^T) + s B
The plain order makes [n, K, d] and mixes it afterwards. The collapse runs n rows through all K maps, so it pays
where n, the rows that differ in prompt or user, is not much larger than the number of distinct prompts; where many
users share a prompt, run the maps once per prompt and mix with `kernels/mix.py`. A GEMM, hence plain torch.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def mixed_linear(
    hidden: Float[Tensor, "n K e"] | Float[Tensor, "n e"],
    mixture: Float[Tensor, "n K"],
    weight: Float[Tensor, "K d e"],
    bias: Float[Tensor, "K d"],
) -> Float[Tensor, "n d"]:
    """sum_k mixture_k (weight_k hidden_k + bias_k) in the dtype of `hidden`; gradients reach all four.

    `hidden` without the axis K is shared by all maps, as the input of a single-layer map is.
    """
    num_maps, out_size, in_size = weight.shape
    if hidden.dim() == 2:
        hidden = hidden[:, None]
    scaled = (mixture[..., None].to(hidden.dtype) * hidden).flatten(1)
    # [d, K e]: rows of e numbers are copied whole, where [K e, d] would turn every map.
    stacked = weight.transpose(0, 1).reshape(out_size, num_maps * in_size)
    return torch.addmm(mixture.to(bias.dtype) @ bias, scaled, stacked.T)


def mixed_linear_reference(
    hidden: Float[Tensor, "n K e"] | Float[Tensor, "n e"],
    mixture: Float[Tensor, "n K"],
    weight: Float[Tensor, "K d e"],
    bias: Float[Tensor, "K d"],
) -> Float[Tensor, "n d"]:
    """The definition: every map's result, then their mixture."""
    if hidden.dim() == 2:
        hidden = hidden[:, None].expand(-1, len(weight), -1)
    maps = torch.einsum("nke,kde->nkd", hidden, weight) + bias
    return torch.einsum("nk,nkd->nd", mixture.to(maps.dtype), maps)
