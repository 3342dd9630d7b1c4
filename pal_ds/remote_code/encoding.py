"""From token ids to the hidden states a head scores: one definition for training and for the exported model."""

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_encoder(config) -> bool:
    """Return whether a transformers config names a bidirectional encoder (BERT, DistilBERT, XLM-R, ...)."""
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def hidden_size_of(config) -> int:
    """Width of the last hidden state; OPT-350m projects it down from `hidden_size`."""
    return getattr(config, "word_embed_proj_dim", None) or config.hidden_size


def state_size_of(config, pooling: str) -> int:
    """Width of the state that stands for a text: mean_max holds two of the last hidden state's width, side by side."""
    return hidden_size_of(config) * (2 if pooling == "mean_max" else 1)


def drop_unused_modules(model: nn.Module) -> None:
    """Removes BERT's pooler, which no score reads: under ZeRO-3 every parameter must take part in every step."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # pyright: ignore[reportArgumentType]  a module may be switched off by None


def hidden_states(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """[N, S, H] of right-padded rows [N, S]."""
    # Encoders have no cache, and those of transformers 4 take no such argument.
    cache = {} if is_encoder(model.config) else {"use_cache": False}
    return model(input_ids=input_ids, attention_mask=attention_mask, **cache).last_hidden_state


def read_states(
    hidden: Tensor,
    attention_mask: Tensor,
    response_positions: Tensor,
    prompt_rows: Tensor | None,
    prompt_length: Tensor | None,
    *,
    pooling: str,
    prompt_tokens: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Responses [R, T, H], prompts [P, C, H] and valid prompt positions [P] of hidden states [N, S, H].

    `pooling` is last, mean, max or mean_max (states of 2H then). `last` reads responses at `response_positions` [R, T],
    and prompts at their last token or, with `prompt_tokens`, at every token from the row's start. The others pool each
    row over all its tokens, those of a prompt in it too, and a prompt over its own: T = C = 1. Positions come from
    lengths, never from pad ids.
    """
    num_responses = response_positions.shape[0]
    if pooling != "last":
        response = pool(hidden[:num_responses], attention_mask[:num_responses] > 0, pooling)
        if prompt_rows is None or prompt_length is None:
            return response, None, None
        inside = torch.arange(hidden.shape[1], device=hidden.device) < prompt_length[:, None]
        prompt = pool(hidden[prompt_rows], inside, pooling)
        return response, prompt, torch.ones_like(prompt_length)
    rows = torch.arange(num_responses, device=hidden.device)[:, None]
    response = hidden[rows, response_positions]
    if prompt_rows is None or prompt_length is None:
        return response, None, None
    if prompt_tokens:
        return response, hidden[prompt_rows], prompt_length
    return response, hidden[prompt_rows, prompt_length - 1][:, None], torch.ones_like(prompt_length)


def pool(hidden: Tensor, inside: Tensor, pooling: str) -> Tensor:
    """Mean (taken in fp32) or largest entry [N, 1, H] of states [N, S, H] over the tokens where `inside` [N, S].

    mean_max: both, [N, 1, 2H].
    """
    if pooling == "mean_max":
        return torch.cat([pool(hidden, inside, kind) for kind in ("mean", "max")], dim=-1)
    if pooling == "max":
        return hidden.masked_fill(~inside[:, :, None], -torch.inf).amax(1, keepdim=True)
    weight = inside.to(torch.float32)[:, :, None]
    mean = (hidden.float() * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    return mean.to(hidden.dtype)
