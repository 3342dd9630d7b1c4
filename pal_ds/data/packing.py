"""Token rows of a batch: padded, one text each, or packed without padding, each prompt once for all its responses.

A packed row holds the prompts one after the other, then the responses. In joint encoding a response's attention reaches
its prompt and itself, and its positions continue the prompt's, so that hidden states are those of the two texts in
one sequence (Krell et al., arXiv 2107.02027, for packing; arXiv 2410.20305 for shared prefixes of preference pairs).
In separate encoding every text is by itself.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pal_ds.heads.jaxtyping_fallback import Int

SMALL_LENGTH = 32
"""Padding of so many tokens is not worth a call of its own."""


class Group(NamedTuple):
    """Sequences of like length, all prompts or all responses, which padding to the longest wastes little on."""

    sequences: Int[Tensor, "n"]
    """Their numbers, prompts first."""
    longest: int
    """Tokens of the longest."""
    longest_keys: int
    """Tokens that the one with the most looks at: with those before it."""
    are_prompts: bool


class Packing(NamedTuple):
    """Places of the sequences of a packed row of S tokens. Axes: P prompts, R responses, M responses of one prompt.

    Lengths are also given as plain numbers: a tensor's size must not wait for the device.
    """

    position_ids: Int[Tensor, "1 S"]
    sequence_start: Int[Tensor, "P+R+1"]
    """First token of each prompt, then of each response, then S."""
    num_before: Int[Tensor, "R"]
    """Tokens of the prompt that stand before each response: all of its prompt's, or 0."""
    prompt_of_response: Int[Tensor, "R"]
    """Without meaning where there are none."""
    responses_of_prompt: Int[Tensor, "P M"]
    """Responses that each prompt stands before; -1 where a prompt has fewer than M."""
    num_prompts: int
    num_prompt_tokens: int
    num_keys: int
    """Tokens that the sequences look at, all together: each response's prompt counts again."""
    longest_prompt: int
    longest: int
    """Tokens of the longest prompt or response."""
    longest_keys: int
    groups: tuple[Group, ...]
    """Every sequence that has tokens, in one of them."""


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


def pack_joint(
    heads: Sequence[np.ndarray], prompts: np.ndarray, tails: Sequence[np.ndarray]
) -> PackedTexts:
    """Pack one row of all distinct heads (what precedes a response), then all tails (the responses).

    Args:
        heads: token ids in front of each response; a function of its prompt and of how many were kept.
        prompts: row of the prompt of each response, int64 [R].
        tails: token ids of each response, at least one.
    """
    prompt_of_response = _shared_prompts(prompts, heads)
    first_with = np.unique(prompt_of_response, return_index=True)[1]
    distinct = [heads[response] for response in first_with]
    return _pack(distinct, tails, prompt_of_response, np.array([len(head) for head in heads]))


def pack_separate(
    prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray], prompt_of_response: np.ndarray
) -> PackedTexts:
    """Pack texts that do not see each other: distinct prompts (none where no one reads them), then responses."""
    return _pack(prompts, responses, prompt_of_response, np.zeros(len(responses), np.int64))


def pack_pooled(responses: Sequence[np.ndarray], prompts: Sequence[np.ndarray]) -> dict[str, Any]:
    """Token fields of a row of texts that each see all of themselves, for encoders.

    Positions and prompt rows are then numbers of texts: responses come first, each one's state is its mean.
    """
    texts = [*responses, *prompts]
    nothing = np.zeros(len(texts), np.int64)
    packed = _pack([], texts, nothing, nothing)
    number = torch.arange(len(texts))
    return {
        **packed.fields(nothing[:, None], with_prompt=False),
        "response_positions": number[: len(responses), None],
        "prompt_rows": number[len(responses) :] if prompts else None,
        "prompt_length": torch.tensor([len(prompt) for prompt in prompts]) if prompts else None,
    }


def _pack(
    prompts: Sequence[np.ndarray],
    responses: Sequence[np.ndarray],
    prompt_of_response: np.ndarray,
    num_before: np.ndarray,
) -> PackedTexts:
    """See `Packing`; a response whose prompt is empty has no tokens before it."""
    lengths = np.array([len(part) for part in (*prompts, *responses)], np.int64)
    start = np.concatenate([[0], np.cumsum(lengths)])
    num_prompts = len(prompts)
    prompt_length, response_length = lengths[:num_prompts], lengths[num_prompts:]
    response_start = start[num_prompts:-1]
    first_position = np.concatenate([np.zeros(num_prompts, np.int64), num_before])
    positions = np.arange(start[-1]) + np.repeat(first_position - start[:-1], lengths)
    ids = np.concatenate([*prompts, *responses]).astype(np.int64)
    joint = num_before + response_length
    table = _responses_of(prompt_of_response, num_before > 0, num_prompts)
    packing = Packing(
        position_ids=torch.from_numpy(positions)[None],
        sequence_start=torch.from_numpy(start),
        num_before=torch.from_numpy(num_before),
        prompt_of_response=torch.from_numpy(prompt_of_response),
        responses_of_prompt=torch.from_numpy(table),
        num_prompts=num_prompts,
        num_prompt_tokens=int(prompt_length.sum()),
        num_keys=int(prompt_length.sum() + joint.sum()),
        longest_prompt=int(prompt_length.max(initial=0)),
        longest=int(lengths.max()),
        longest_keys=int(max(joint.max(), prompt_length.max(initial=0))),
        groups=tuple(_groups(prompt_length, prompt_length, 0, are_prompts=True))
        + tuple(_groups(response_length, joint, num_prompts, are_prompts=False)),
    )
    column = start[:num_prompts].copy()
    for response in np.flatnonzero(prompt_length[prompt_of_response] == 0) if num_prompts else ():
        column[prompt_of_response[response]] = response_start[response]
    return PackedTexts(
        torch.from_numpy(ids)[None],
        packing,
        response_start,
        column,
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


def _groups(
    lengths: np.ndarray, num_keys: np.ndarray, first: int, *, are_prompts: bool
) -> Iterator[Group]:
    """Cuts sequences `first`, `first` + 1, ... by their keys, then by their own tokens."""
    of_keys = np.flatnonzero(lengths)
    for alike in _alike(of_keys, num_keys):
        for members in _alike(alike, lengths):
            yield Group(
                torch.from_numpy(first + np.sort(members)),
                int(lengths[members].max()),
                int(num_keys[members].max()),
                are_prompts,
            )


def _alike(members: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """Runs of members whose sizes are at least 2/3 of their largest, or small anyway; the large ones first."""
    members = members[np.argsort(-sizes[members], kind="stable")]
    while len(members):
        largest = sizes[members[0]]
        num_alike = int((sizes[members] >= min(largest / 1.5, largest - SMALL_LENGTH)).sum())
        yield members[:num_alike]
        members = members[num_alike:]


def _responses_of(prompt_of_response: np.ndarray, sees: np.ndarray, num_prompts: int) -> np.ndarray:
    """Responses that see each prompt, in ascending order, int64 [P, M], -1 where there are no more."""
    seeing = np.flatnonzero(sees)
    prompt = prompt_of_response[seeing]
    count = np.bincount(prompt, minlength=num_prompts)
    order = np.argsort(prompt, kind="stable")
    column = np.arange(len(order)) - np.repeat(np.cumsum(count) - count, count)
    table = np.full((num_prompts, int(count.max(initial=0))), -1, np.int64)
    table[prompt[order], column] = seeing[order]
    return table


def pad_right(
    sequences: list[np.ndarray], pad_token_id: int
) -> tuple[Int[Tensor, "N S"], Int[Tensor, "N S"]]:
    """Ids and attention mask, int64, of the sequences padded to the longest."""
    lengths = np.asarray([len(sequence) for sequence in sequences])
    mask = np.arange(lengths.max())[None, :] < lengths[:, None]
    ids = np.full(mask.shape, pad_token_id, np.int64)
    ids[mask] = np.concatenate(sequences)
    return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))
