"""Packs the distinct texts of a batch into one row without padding: each prompt once for all of its responses.

The row holds the prompts one after the other, then the responses. A response's attention reaches its prompt and
itself, and its positions continue the prompt's, so that hidden states are those of the two texts in one sequence
(Krell et al., arXiv 2107.02027, for packing; arXiv 2410.20305 for shared prefixes of preference pairs).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pal_ds.heads.shapes import Int


class Packing(NamedTuple):
    """Where the sequences of a packed row of S tokens lie. Axes: P prompts, R responses, M responses of one prompt.

    Lengths are also given as plain numbers: a tensor's size must not wait for the device.
    """

    position_ids: Int[Tensor, "1 S"]
    sequence_start: Int[Tensor, "P+R+1"]
    """First token of each prompt, then of each response, then S."""
    prompt_of_response: Int[Tensor, "R"]
    responses_of_prompt: Int[Tensor, "P M"]
    """-1 where a prompt has fewer than M."""
    num_prompts: int
    num_prompt_tokens: int
    num_keys: int
    """Tokens that the sequences look at, all together: each response's prompt counts again."""
    longest_prompt: int
    longest_response: int
    longest_joint: int
    """Tokens of the longest response with its prompt."""


class PackedTexts(NamedTuple):
    """A packed row and where its texts are found in it."""

    input_ids: Int[Tensor, "1 S"]
    packing: Packing
    response_start: np.ndarray
    """Column of each response's first token, int64 [R]."""
    prompt_column: np.ndarray
    """Column of each prompt's first token, int64 [P]; where there is no prompt, of its response's."""
    prompt_length: np.ndarray
    prompt_of_response: np.ndarray

    def fields(self, scored_columns: np.ndarray, *, with_prompt: bool) -> dict[str, Any]:
        """Token fields of a batch; `scored_columns` int64 [R, T] count from each response's first token."""
        return {
            **dict.fromkeys(("attention_mask", "response_states", "prompt_states")),
            "input_ids": self.input_ids,
            "response_positions": torch.from_numpy(self.response_start[:, None] + scored_columns),
            "prompt_rows": torch.from_numpy(self.prompt_column) if with_prompt else None,
            "prompt_length": torch.from_numpy(np.maximum(self.prompt_length, 1))
            if with_prompt
            else None,
            "packing": self.packing,
        }


def pack(
    heads: Sequence[np.ndarray], prompts: np.ndarray, tails: Sequence[np.ndarray]
) -> PackedTexts:
    """One row of all distinct heads (what precedes a response), then all tails (the responses).

    Args:
        heads: token ids in front of each response; a function of its prompt and of how many were kept.
        prompts: row of the prompt of each response, int64 [R].
        tails: token ids of each response, at least one.
    """
    prompt_of_response = _shared_prompts(prompts, heads)
    first_with = np.unique(prompt_of_response, return_index=True)[1]
    distinct = [heads[response] for response in first_with]
    lengths = np.array([len(part) for part in (*distinct, *tails)], np.int64)
    start = np.concatenate([[0], np.cumsum(lengths)])
    num_prompts = len(distinct)
    prompt_length, response_length = lengths[:num_prompts], lengths[num_prompts:]
    joint = prompt_length[prompt_of_response] + response_length
    responses_of_prompt = _inverse(prompt_of_response, num_prompts)
    response_start = start[num_prompts:-1]
    first_position = np.concatenate(
        [np.zeros(num_prompts, np.int64), prompt_length[prompt_of_response]]
    )
    positions = np.arange(start[-1]) + np.repeat(first_position - start[:-1], lengths)
    ids = np.concatenate([*distinct, *tails]).astype(np.int64)
    packing = Packing(
        position_ids=torch.from_numpy(positions)[None],
        sequence_start=torch.from_numpy(start),
        prompt_of_response=torch.from_numpy(prompt_of_response),
        responses_of_prompt=torch.from_numpy(responses_of_prompt),
        num_prompts=num_prompts,
        num_prompt_tokens=int(prompt_length.sum()),
        num_keys=int(prompt_length.sum() + joint.sum()),
        longest_prompt=int(prompt_length.max()),
        longest_response=int(response_length.max()),
        longest_joint=int(joint.max()),
    )
    return PackedTexts(
        torch.from_numpy(ids)[None],
        packing,
        response_start,
        np.where(prompt_length > 0, start[:num_prompts], response_start[responses_of_prompt[:, 0]]),
        prompt_length,
        prompt_of_response,
    )


def _shared_prompts(prompts: np.ndarray, heads: Sequence[np.ndarray]) -> np.ndarray:
    """Number of each response's prompt among the distinct ones, in order of first appearance, int64 [R]."""
    # A response that leaves no room for a prompt shares none: its own first token stands in for it.
    keys = [
        (prompt, len(head)) if len(head) else (-1 - response, 0)
        for response, (prompt, head) in enumerate(zip(prompts.tolist(), heads, strict=True))
    ]
    number: dict[tuple[int, int], int] = {}
    return np.array([number.setdefault(key, len(number)) for key in keys], np.int64)


def _inverse(prompt_of_response: np.ndarray, num_prompts: int) -> np.ndarray:
    """Responses of each prompt in ascending order, int64 [P, M], -1 where there are no more."""
    count = np.bincount(prompt_of_response, minlength=num_prompts)
    order = np.argsort(prompt_of_response, kind="stable")
    column = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    table = np.full((num_prompts, int(count.max())), -1, np.int64)
    table[prompt_of_response[order], column] = order
    return table
