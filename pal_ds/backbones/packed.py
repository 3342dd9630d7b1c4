"""Hidden states of a packed batch: one row without padding, each prompt computed once."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from pal_ds.backbones.packed_blocks import Blocks, blocks_of
from pal_ds.backbones.packed_spans import Spans, spans_of, varlen_kernel
from pal_ds.data.batch import Batch
from pal_ds.data.packing import Packing
from pal_ds.heads.shapes import Float, Int

FAMILIES = frozenset(
    (
        *("cohere", "exaone4", "gemma", "glm", "gpt2", "gpt_neox", "granite", "llama", "mistral"),
        *("olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"),
    )
)
"""Decoders (transformers' model_type) whose packed states the tests have found equal to those of single texts.

Others could be silently wrong: positions as a bias on the attention (ALiBi), soft caps, attention of their own.
"""


Layout = Callable[[Packing], Blocks | Spans]


def choose_layout(wanted: str, precision: str, gpu: bool) -> tuple[Layout, str]:
    """(layout, what it is and why) for `backbone.attention`: variable-length flash attention where it can run."""
    if wanted == "sdpa":
        return blocks_of, "SDPA over blocks (asked for by backbone.attention)"
    if not gpu or precision != "bf16":
        return blocks_of, "SDPA over blocks (flash attention needs a GPU and half precision)"
    kernel, reason = varlen_kernel()
    if kernel is None:
        return blocks_of, f"SDPA over blocks ({reason})"
    return partial(spans_of, kernel=kernel), f"variable-length flash attention ({reason})"


def packed_states(
    model: nn.Module, batch: Batch, layout: Layout, *, prompt_tokens: bool
) -> tuple[Float[Tensor, "R T H"], Float[Tensor, "P C H"] | None, Int[Tensor, "P"] | None]:
    """(responses, prompts, valid positions of each prompt), as `exported.encoding.encode_tokens` for padded rows."""
    assert batch.packing is not None and batch.input_ids is not None
    assert batch.response_positions is not None, "a packed batch has token ids"
    hidden = model(
        input_ids=batch.input_ids,
        # Given as it is to the attention function, which has no use for it; without one, transformers would take
        # positions that start again for sequences packed in its own way and build a mask for them.
        attention_mask=torch.ones(1, 1, 1, 1, device=batch.input_ids.device),
        position_ids=batch.packing.position_ids,
        use_cache=False,
        pal_layout=layout(batch.packing),
    ).last_hidden_state[0]
    response = hidden[batch.response_positions]
    start, length = batch.prompt_rows, batch.prompt_length
    if start is None or length is None:
        return response, None, None
    if not prompt_tokens:
        return response, hidden[start + length - 1][:, None], torch.ones_like(length)
    column = torch.arange(max(batch.packing.longest_prompt, 1), device=hidden.device)
    return response, hidden[start[:, None] + column.minimum(length[:, None] - 1)], length
