"""Hidden states of a packed batch: one row without padding, each prompt computed once.

Its attention is registered with transformers, so no model is patched. Without a layout it is transformers' own SDPA, so
one model serves packed and padded batches.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pal_ds.backbones.config import Pooling
from pal_ds.backbones.packed_blocks import Blocks, blocks_of
from pal_ds.backbones.packed_spans import Spans, spans_of, varlen_kernel
from pal_ds.data.batch import Batch
from pal_ds.data.packing import Packing
from pal_ds.errors import UserError
from pal_ds.heads.jaxtyping_fallback import Float, Int

DECODERS = frozenset(
    (
        *("cohere", "exaone4", "gemma", "glm", "gpt2", "gpt_neox", "granite", "llama", "mistral"),
        *("olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "starcoder2"),
    )
)
ENCODERS = frozenset(("bert", "distilbert", "roberta", "xlm-roberta"))
FAMILIES = DECODERS | ENCODERS
"""Models (transformers' model_type) whose packed states the tests have found equal to those of single texts.

Others could be silently wrong: positions as a bias on the attention (ALiBi), soft caps, attention of their own.
"""
_POSITIONS_BEHIND_PAD = ("roberta", "xlm-roberta")
NAME = "pal_packed"
"""Name under which transformers knows `packed_attention`; goes into `attn_implementation`."""
Layout = Callable[[Packing], Blocks | Spans]


def choose_layout(
    wanted: str, precision: str, *, gpu: bool, causal: bool = True, dropout: bool = False
) -> tuple[Layout, str]:
    """(layout, what it is and why) for `backbone.attention`: variable-length flash attention where it can run.

    `dropout`: whether the model drops attention weights in training, which not every kernel can.

    Raises:
        UserError: flash attention is asked for by name and cannot run.
    """
    kernel, reason = None, "it needs a GPU and half precision"
    if wanted == "sdpa":
        reason = "asked for by backbone.attention"
    elif gpu and precision == "bf16":
        kernel, reason = varlen_kernel(dropout=dropout)
    if kernel is not None:
        layout = partial(spans_of, kernel=kernel, causal=causal)
        return layout, f"variable-length flash attention ({reason})"
    refuse_without_flash(wanted, reason)
    return partial(blocks_of, causal=causal), f"SDPA over blocks, no flash attention: {reason}"


def refuse_without_flash(wanted: str, reason: str) -> None:
    """Raises UserError where flash attention, which cannot run, is asked for by name."""
    if wanted == "flash_attention_2":
        raise UserError(
            f"backbone.attention: flash_attention_2 cannot run here: {reason}. Set it to auto or sdpa."
        )


def drops_attention(model_config: PretrainedConfig) -> bool:
    """Return whether a transformers config asks for dropout of attention weights, by any of its names."""
    names = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
    return any((getattr(model_config, name, 0) or 0) > 0 for name in names)


def packed_states(
    hidden: Float[Tensor, "S H"], batch: Batch, *, prompt_tokens: bool
) -> tuple[Float[Tensor, "R T H"], Float[Tensor, "P C H"] | None, Int[Tensor, "P"] | None]:
    """(responses, prompts, valid positions of each prompt), as `exported.encoding.read_states` for padded rows."""
    assert batch.packing is not None and batch.response_positions is not None
    response = hidden[batch.response_positions]
    start, length = batch.prompt_rows, batch.prompt_length
    if start is None or length is None:
        return response, None, None
    if not prompt_tokens:
        return response, hidden[start + length - 1][:, None], torch.ones_like(length)
    column = torch.arange(max(batch.packing.longest_prompt, 1), device=hidden.device)
    return response, hidden[start[:, None] + column.minimum(length[:, None] - 1)], length


def pooled_states(
    hidden: Float[Tensor, "S H"], batch: Batch, pooling: Pooling
) -> tuple[Float[Tensor, "R 1 H"], Float[Tensor, "P 1 H"] | None, Int[Tensor, "P"] | None]:
    """Read states as `packed_states` does, for encoders: one state for each text, pooled in fp32."""
    assert batch.packing is not None and batch.response_positions is not None
    if pooling == "mean_max":
        return _side_by_side(pooled_states, hidden, batch)
    lengths = batch.packing.sequence_start.diff()
    # In the order of tokens on every device; the lengths are right by construction, and checking them would wait.
    pooled = torch.segment_reduce(hidden.float(), pooling, lengths=lengths, unsafe=True)
    texts = pooled.to(hidden.dtype)[:, None]
    rows = batch.prompt_rows
    response = texts[: len(batch.response_positions)]
    if rows is None:
        return response, None, None
    return response, texts[rows], torch.ones_like(rows)


def pooled_pairs(
    hidden: Float[Tensor, "S H"], batch: Batch, pooling: Pooling
) -> tuple[Float[Tensor, "R 1 H"], Float[Tensor, "P 1 H"] | None, Int[Tensor, "P"] | None]:
    """Read states as `packed_states` does, for decoders: pooled in fp32 over a response and the prompt in front of it.

    Each sequence is reduced once, in the order of its tokens, and a prompt's part then joins its responses'.
    """
    packing = batch.packing
    assert packing is not None
    if pooling == "mean_max":
        return _side_by_side(pooled_pairs, hidden, batch)
    lengths, num_prompts = packing.sequence_start.diff(), packing.num_prompts
    kind, nothing = ("max", -torch.inf) if pooling == "max" else ("sum", 0.0)
    parts = torch.segment_reduce(
        hidden.float(), kind, lengths=lengths, unsafe=True, initial=nothing
    )
    prompts, pooled = parts[:num_prompts], parts[num_prompts:]
    if num_prompts:
        shares = (packing.num_before > 0)[:, None]
        before = torch.where(shares, prompts[packing.prompt_of_response], nothing)
        pooled = torch.maximum(pooled, before) if pooling == "max" else pooled + before
    if pooling == "mean":
        pooled = pooled / (lengths[num_prompts:] + packing.num_before)[:, None]
        prompts = prompts / lengths[:num_prompts, None].clamp(min=1)
    response = pooled.to(hidden.dtype)[:, None]
    rows = batch.prompt_rows
    if rows is None:
        return response, None, None
    # Where a response leaves no room for a prompt, its own first token stands in.
    prompts = torch.where(lengths[:num_prompts, None] > 0, prompts, hidden[rows].float())
    return response, prompts.to(hidden.dtype)[:, None], torch.ones_like(rows)


def _side_by_side(
    read: Callable[..., tuple[Tensor, Tensor | None, Tensor | None]], hidden: Tensor, batch: Batch
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Means and largest entries of `read`, one of the two functions above, in states of twice the width."""
    mean, prompt_mean, prompt_length = read(hidden, batch, "mean")
    largest, prompt_largest, _ = read(hidden, batch, "max")
    response = torch.cat([mean, largest], dim=-1)
    if prompt_mean is None or prompt_largest is None:
        return response, None, None
    return response, torch.cat([prompt_mean, prompt_largest], dim=-1), prompt_length


def packed_hidden(
    model: nn.Module, batch: Batch, packing: Packing, layout: Layout
) -> Float[Tensor, "1 S H"]:
    """Hidden states of all tokens of the row."""
    assert batch.input_ids is not None, "a packed batch has token ids"
    config: Any = model.config
    behind = config.pad_token_id + 1 if config.model_type in _POSITIONS_BEHIND_PAD else 0
    output = model(
        input_ids=batch.input_ids,
        # Given as it is to the attention function, which has no use for it; without one, transformers would take
        # positions that start again for sequences packed in its own way and build a mask for them.
        attention_mask=torch.ones(1, 1, 1, 1, device=batch.input_ids.device),
        position_ids=packing.position_ids + behind,
        pal_layout=layout(packing),
        **({"use_cache": False} if config.model_type in DECODERS else {}),
    )
    return output.last_hidden_state


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
    for name in ("softcap", "s_aux", "position_bias"):
        unknown = f"packed attention has no {name}; this family must not be packed"
        assert kwargs.get(name) is None, unknown
    dropout, scaling = kwargs.get("dropout", 0.0), kwargs.get("scaling")
    window = kwargs.get("sliding_window")
    output = pal_layout.attend(query[0], key[0], value[0], dropout, scaling, window)
    return output.transpose(0, 1)[None], None


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
