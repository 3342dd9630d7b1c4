"""From token ids to the hidden states a head scores: one definition for training and for the exported model."""

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_encoder(config) -> bool:
    """Whether a transformers config names a bidirectional encoder (BERT, DistilBERT, XLM-R, ...)."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def hidden_size_of(config) -> int:
    """Width of the last hidden state; OPT-350m projects it down from `hidden_size`."""
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def drop_unused_modules(model: nn.Module) -> None:
    """Removes BERT's pooler, which no score reads: under ZeRO-3 every parameter must take part in every step."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # pyright: ignore[reportArgumentType]  a module may be switched off by None


def encode_tokens(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    response_positions: Tensor,
    prompt_rows: Tensor | None,
    prompt_length: Tensor | None,
    *,
    pool_mean: bool,
    prompt_tokens: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Responses [R, T, H], prompts [P, C, H] and valid prompt positions [P] of right-padded rows [N, S].

    `pool_mean` averages each row over its tokens (encoders): T = C = 1. Otherwise responses are read at
    `response_positions` [R, T], and prompts at their last token or, with `prompt_tokens`, at every token from the
    row's start. Positions come from lengths, never from pad ids.
    """
    hidden = model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False
    ).last_hidden_state
    num_responses = response_positions.shape[0]
    if pool_mean:
        weight = attention_mask.to(torch.float32)[:, :, None]
        pooled = ((hidden.float() * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)).to(
            hidden.dtype
        )
        prompt = None if prompt_rows is None else pooled[prompt_rows]
        length = None if prompt_rows is None else torch.ones_like(prompt_rows)
        return pooled[:num_responses], prompt, length
    rows = torch.arange(num_responses, device=hidden.device)[:, None]
    response = hidden[rows, response_positions]
    if prompt_rows is None or prompt_length is None:
        return response, None, None
    if prompt_tokens:
        return response, hidden[prompt_rows], prompt_length
    return response, hidden[prompt_rows, prompt_length - 1][:, None], torch.ones_like(prompt_length)
