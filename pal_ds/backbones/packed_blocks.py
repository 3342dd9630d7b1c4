"""Packed attention by torch's SDPA: the row's prompts and responses as two padded blocks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pal_ds.backbones.token_copies import Gather, copies, owner_and_column, shared_copies
from pal_ds.data.packing import Packing
from pal_ds.heads.shapes import Bool, Float, Int


class Blocks(NamedTuple):
    """A packed row as two padded blocks for SDPA: prompts [P, longest], responses [R, longest] with their keys.

    A key's column in a response's block is its position, so that causality is an inequality of positions.
    """

    queries: Gather
    keys: Gather
    prompt_shape: tuple[int, int]
    response_shape: tuple[int, int]
    keys_shape: tuple[int, int]
    query_position: Int[Tensor, "R 1 Q 1"]
    visible: Bool[Tensor, "R 1 #Q J"]
    """Whether a response's query may look at a key; a window narrows it."""


def blocks_of(packing: Packing, *, causal: bool = True) -> Blocks:
    """Index tensors of the two blocks, on the packing's device and without waiting for it.

    Where attention is not causal no response has a prompt before it, and there is no block of prompts.
    """
    assert causal or packing.num_prompts == 0, "texts that see all of themselves share no prefix"
    start, slot = packing.sequence_start, packing.prompt_of_response
    num_prompts, num_responses = packing.num_prompts, len(slot)
    longest = packing.longest_prompt, packing.longest_response, packing.longest_joint
    of_prompt, of_response, of_key = (torch.arange(n, device=start.device) for n in longest)
    before = packing.num_before[:, None]
    own = start[num_prompts:-1, None]
    prompt = start[:num_prompts, None] + of_prompt
    response = own + of_response
    key = torch.where(of_key < before, start[slot][:, None] + of_key, own - before + of_key)
    # Columns past a sequence's end hold some other token; no valid query reaches them.
    prompt, response, key = (
        part.minimum(start[-1] - 1).flatten() for part in (prompt, response, key)
    )
    owner, column = owner_and_column(packing)
    of_prompts, position = len(prompt), packing.position_ids[0]
    in_prompts, row = owner * longest[0] + column, owner - num_prompts
    in_responses = of_prompts + row * longest[1] + column
    in_keys = of_prompts + row * longest[2] + position
    keys_start = of_prompts + torch.arange(num_responses, device=start.device) * longest[2]
    shared = shared_copies(packing, owner, column, keys_start, of_prompts + len(key))
    query_position = (before + of_response)[:, None, :, None]
    return Blocks(
        Gather(
            torch.cat([prompt, response]),
            torch.where(row < 0, in_prompts, in_responses),
            shared[:, :0],
        ),
        Gather(torch.cat([prompt, key]), torch.where(row < 0, in_prompts, in_keys), shared),
        (num_prompts, longest[0]),
        (num_responses, longest[1]),
        (num_responses, longest[2]),
        query_position,
        query_position >= of_key if causal else _within(own, start[num_prompts + 1 :], of_key),
    )


def _within(
    begin: Int[Tensor, "R 1"], end: Int[Tensor, "R"], of_key: Int[Tensor, "J"]
) -> Bool[Tensor, "R 1 1 J"]:
    """Whether a column holds a token of the response."""
    return (begin + of_key < end[:, None])[:, None, None, :]


def attend_blocks(
    query: Float[Tensor, "h S D"],
    key: Float[Tensor, "g S D"],
    value: Float[Tensor, "g S D"],
    blocks: Blocks,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Float[Tensor, "h S D"]:
    """Prompts see themselves; responses see their prompt and themselves: two calls of SDPA."""
    shapes = blocks.prompt_shape, blocks.response_shape, blocks.keys_shape
    query_prompt, query_response = _split(copies(query, blocks.queries), *shapes[:2])
    key_prompt, key_response = _split(copies(key, blocks.keys), shapes[0], shapes[2])
    value_prompt, value_response = _split(copies(value, blocks.keys), shapes[0], shapes[2])
    mask = blocks.visible
    if window is not None:
        step = torch.arange(blocks.keys_shape[1], device=query.device)
        mask = mask & (blocks.query_position < step + window)
    options = {"dropout_p": dropout, "scale": scaling, "enable_gqa": len(query) != len(key)}
    response = nn.functional.scaled_dot_product_attention(
        query_response, key_response, value_response, attn_mask=mask, **options
    )
    parts = [response.transpose(0, 1).flatten(1, 2)]
    longest = blocks.prompt_shape[1]
    if longest:
        causal: dict[str, Any] = {"is_causal": True}
        if window is not None and window < longest:
            step = torch.arange(longest, device=query.device)
            seen = (step[:, None] >= step) & (step[:, None] < step + window)
            causal = {"attn_mask": seen}
        prompt = nn.functional.scaled_dot_product_attention(
            query_prompt, key_prompt, value_prompt, **causal, **options
        )
        parts.insert(0, prompt.transpose(0, 1).flatten(1, 2))
    return torch.cat(parts, dim=1).index_select(1, blocks.queries.first_copy)


def _split(
    x: Float[Tensor, "h n D"], first: tuple[int, int], second: tuple[int, int]
) -> tuple[Float[Tensor, "P h L D"], Float[Tensor, "R h Q D"]]:
    """The two blocks of gathered rows, heads behind the batch axis as SDPA wants them."""
    boundary = first[0] * first[1]
    return (
        x[:, :boundary].unflatten(1, first).transpose(0, 1),
        x[:, boundary:].unflatten(1, second).transpose(0, 1),
    )
