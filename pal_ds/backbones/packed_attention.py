"""Attention over packed rows, registered with transformers: no model is patched.

Without a layout the registered function is transformers' own SDPA, so one model serves packed and padded batches.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pal_ds.backbones.packed_blocks import Blocks, attend_blocks
from pal_ds.backbones.packed_spans import Spans, attend_spans
from pal_ds.heads.jaxtyping_fallback import Float

NAME = "pal_packed"
"""Name under which the function is registered; goes into `attn_implementation`."""


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 h S D"],
    key: Float[Tensor, "1 g S D"],
    value: Float[Tensor, "1 g S D"],
    attention_mask: Tensor | None,
    pal_layout: Blocks | Spans | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "1 S h D"], None]:
    """Attention of the packed row that `pal_layout` describes; plain SDPA of a padded batch without one."""
    if pal_layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    dropout, scaling = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    sliding_window = kwargs.get("sliding_window")
    unknown = [
        name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None
    ]
    assert not unknown, f"packed attention has no {unknown[0]}; this family must not be packed"
    states = query[0], key[0], value[0]
    if isinstance(pal_layout, Spans):
        output = attend_spans(*states, pal_layout, dropout, scaling, sliding_window)
    else:
        output = attend_blocks(*states, pal_layout, dropout, scaling, sliding_window)
    return output.transpose(0, 1)[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)

__all__ = ["NAME", "packed_attention"]
