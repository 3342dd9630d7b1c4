"""Cost of the comparisons of prepared data for a backbone, in tokens."""

import numpy as np

from pal_ds.data.collator import Collator
from pal_ds.data.split_packed import PairTexts


def padded_lengths(collator: Collator, rows: np.ndarray) -> np.ndarray:
    """Tokens that each comparison costs when padded alone: its sequences times the longest of them, int64 [n]."""
    texts = pair_texts(collator, rows)
    lengths = texts.response_tokens
    if collator.encoding == "joint":
        lengths = lengths + texts.prompt_tokens
    elif collator.with_prompt:
        lengths = np.concatenate([lengths, texts.prompt_tokens[:, :1]], axis=1)
    return lengths.shape[1] * lengths.max(axis=1)


def pair_texts(collator: Collator, rows: np.ndarray) -> PairTexts:
    """Texts of the comparisons `rows`, with what truncation leaves of them."""
    data, tokens = collator.data, collator.data.info["tokens"]
    responses = np.stack([data.comparisons[side][rows] for side in ("a", "b")], axis=1)
    responses = responses.astype(np.int64)
    prompts = data.response_prompt[responses]
    response_tokens = collator.responses.lengths_of(responses)
    prompt_tokens = collator.prompts.lengths_of(prompts)
    if collator.encoding == "joint":
        room = tokens["max_length"] - response_tokens
    else:
        room = tokens["max_length"] * int(collator.with_prompt)
        response_tokens = response_tokens + len(tokens["prefix_ids"])
    prompt_tokens = np.minimum(prompt_tokens, room)
    joint = collator.encoding == "joint"
    if collator.packed and collator.pooled and joint:
        # A text that sees all of itself shares no prefix.
        prompt_tokens, response_tokens = 0 * prompt_tokens, response_tokens + prompt_tokens
    return PairTexts(prompts[:, 0], responses, prompt_tokens, response_tokens, joint)
