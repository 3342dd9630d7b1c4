"""Token rows as any tokenizer call left them, and rows padded to the right for the model.

An exported model folder carries this very file.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def token_mask(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    pad_token_id: int | None,
    end_ids: Sequence[int],
) -> Tensor:
    """Mark the entries of [B, L] that are tokens of the text, bool on the CPU.

    Without an attention mask, padding is runs of the pad id at a row's edges; where that id may
    also end a text (pad == eos), a row alone counts as unpadded and several raise ValueError.
    """
    if input_ids.dim() != 2:
        raise ValueError(
            f"input_ids has shape {tuple(input_ids.shape)}; it must be [batch, length]."
        )
    if attention_mask is None:
        mask = _without_padding(input_ids.cpu(), pad_token_id, end_ids)
    elif attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids "
            f"{tuple(input_ids.shape)}; they must be equal."
        )
    else:
        mask = attention_mask.bool().cpu()
    if not mask.any(1).all():
        raise ValueError("input_ids holds a row without tokens; every row must be a text.")
    return mask


def _without_padding(input_ids: Tensor, pad_token_id: int | None, end_ids: Sequence[int]) -> Tensor:
    if pad_token_id is None or pad_token_id in end_ids:
        if len(input_ids) > 1:
            raise ValueError(
                f"attention_mask is missing, and the pad id ({pad_token_id}) may also end a text: "
                "pass the attention_mask that the tokenizer gave."
            )
        return torch.ones_like(input_ids, dtype=torch.bool)
    other = (input_ids != pad_token_id).int()
    return (other.cummax(1).values * other.flip(1).cummax(1).values.flip(1)).bool()


def pad_right(
    rows: Sequence[Sequence[int]], pad_token_id: int | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(ids, mask), int64 [B, longest], of rows padded to the right; masked ids are never read."""
    longest = max(map(len, rows))
    fill = pad_token_id or 0
    ids = [[*row, *[fill] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def spread(rewards: Tensor, places: list[list[int]], mask: Tensor) -> Tensor:
    """Rewards [B, T] of the tokens of each text, put where `mask` [B, L] has them; else 0."""
    scores = rewards.new_zeros(mask.shape)
    for row, place in enumerate(places):
        read = torch.tensor(place, device=rewards.device) >= 0
        values = torch.where(read, rewards[row, : len(place)], 0.0)
        scores[row, mask[row].to(rewards.device)] = values
    return scores


class Text(NamedTuple):
    """A text as the backbone reads it."""

    ids: list[int]
    """The row that holds the response."""
    first_cut: int
    num_cut: int
    """Ids of the canonical row that are missing from `first_cut` on."""
    prompt: list[int]
    """The prompt's own row (separate encoding)."""
    prompt_length: int
    """The prompt's length within `ids` (joint encoding)."""
