"""Packed attention by torch's SDPA: the row's prompts and responses as padded blocks of sequences of like length."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pal_ds.backbones.token_copies import Gather, copies, owner_and_column, shared_copies
from pal_ds.data.packing import Packing
from pal_ds.heads.jaxtyping_fallback import Bool, Float, Int


class Block(NamedTuple):
    """n sequences of Q queries and J keys each, padded. A key's column is its position in the text."""

    shape: tuple[int, int]
    """(n, Q)"""
    keys_shape: tuple[int, int]
    """(n, J)"""
    query_position: Int[Tensor, "#n 1 Q 1"]
    visible: Bool[Tensor, "n 1 #Q J"] | None
    """True where a query may look at a key; None: prompts, each query at itself and what is before it."""


class Blocks(NamedTuple):
    """A packed row as blocks; their queries lie one block after the other in the copies, and so do their keys."""

    queries: Gather
    keys: Gather
    parts: tuple[Block, ...]

    def attend(
        self,
        query: Float[Tensor, "h S D"],
        key: Float[Tensor, "g S D"],
        value: Float[Tensor, "g S D"],
        dropout: float,
        scaling: float | None,
        window: int | None,
    ) -> Float[Tensor, "h S D"]:
        """Prompts see themselves; responses see their prompt and themselves: one call of SDPA for each block."""
        queries = _split(copies(query, self.queries), [part.shape for part in self.parts])
        keys, values = (
            _split(copies(states, self.keys), [part.keys_shape for part in self.parts])
            for states in (key, value)
        )
        grouped = len(query) != len(key)
        outputs = []
        for part, *states in zip(self.parts, queries, keys, values, strict=True):
            output = nn.functional.scaled_dot_product_attention(
                *states, **_mask(part, window), dropout_p=dropout, scale=scaling, enable_gqa=grouped
            )
            outputs.append(output.transpose(0, 1).flatten(1, 2))
        return torch.cat(outputs, dim=1).index_select(1, self.queries.first_copy)


def blocks_of(packing: Packing, *, causal: bool = True) -> Blocks:
    """Index tensors of the blocks, on the packing's device and without waiting for it.

    Where attention is not causal no response has a prompt before it, and there are no prompts.
    """
    assert causal or packing.num_prompts == 0, "texts that see all of themselves share no prefix"
    start, num_prompts = packing.sequence_start, packing.num_prompts
    before = torch.cat([start.new_zeros(num_prompts), packing.num_before])
    prefix = torch.cat([start[:num_prompts], start[packing.prompt_of_response]])
    end, last_token = start[1:], start[-1] - 1
    # Where each sequence's queries and keys begin among the copies.
    first_query, first_key = torch.zeros_like(before), torch.zeros_like(before)
    query_tokens, key_tokens, parts = [], [], []
    num_queries = num_keys = 0
    for group in packing.groups:
        rows = group.sequences
        row_number = torch.arange(len(rows), device=start.device)
        of_query, of_key = (
            torch.arange(n, device=start.device) for n in (group.longest, group.longest_keys)
        )
        first_query[rows] = num_queries + row_number * group.longest
        first_key[rows] = num_keys + row_number * group.longest_keys
        own, ahead = start[rows][:, None], before[rows][:, None]
        keys = torch.where(of_key < ahead, prefix[rows][:, None] + of_key, own - ahead + of_key)
        # Columns past a sequence's end hold some other token; no valid query reaches them.
        query_tokens.append((own + of_query).minimum(last_token).flatten())
        key_tokens.append(keys.minimum(last_token).flatten())
        num_queries += len(query_tokens[-1])
        num_keys += len(key_tokens[-1])
        query_position = (ahead + of_query)[:, None, :, None]
        visible = None
        if not causal:
            length = (end[rows] - start[rows])[:, None]
            visible = (of_key < length)[:, None, None, :]
        elif not group.are_prompts:
            visible = query_position >= of_key
        else:
            query_position = query_position[:1]
        shape, keys_shape = (len(rows), len(of_query)), (len(rows), len(of_key))
        parts.append(Block(shape, keys_shape, query_position, visible))
    owner, column = owner_and_column(packing)
    shared = shared_copies(packing, owner, column, first_key[num_prompts:], num_keys)
    return Blocks(
        Gather(torch.cat(query_tokens), first_query[owner] + column, shared[:, :0]),
        Gather(torch.cat(key_tokens), first_key[owner] + before[owner] + column, shared),
        tuple(parts),
    )


def _mask(block: Block, window: int | None) -> dict[str, Any]:
    """Arguments of SDPA that say who sees whom."""
    num_keys = block.keys_shape[1]
    if window is None or window >= num_keys:
        return {"is_causal": True} if block.visible is None else {"attn_mask": block.visible}
    step = torch.arange(num_keys, device=block.query_position.device)
    near = block.query_position < step + window
    seen = block.query_position >= step if block.visible is None else block.visible
    return {"attn_mask": seen & near}


def _split(
    x: Float[Tensor, "h m D"], shapes: list[tuple[int, int]]
) -> list[Float[Tensor, "n h L D"]]:
    """The blocks of gathered rows, heads behind the batch axis as SDPA wants them."""
    pieces = x.split([rows * columns for rows, columns in shapes], dim=1)
    return [
        piece.unflatten(1, shape).transpose(0, 1)
        for piece, shape in zip(pieces, shapes, strict=True)
    ]
