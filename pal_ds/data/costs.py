"""What the comparisons of prepared data cost a backbone, in tokens."""

import numpy as np

from pal_ds.data.batch import Collator
from pal_ds.data.split_packed import PairTexts


def padded_lengths(collator: Collator, rows: np.ndarray) -> np.ndarray:
    """Tokens that each comparison costs when padded alone: its sequences times the longest of them, int64 [n]."""
    tokens = collator.data.info["tokens"]
    texts = pair_texts(collator, rows)
    lengths = texts.response_tokens
    if collator.encoding == "joint":
        lengths = lengths + texts.prompt_tokens
    else:
        lengths = lengths + len(tokens["prefix_ids"])
        if collator.with_prompt:
            prompts = collator.prompts.lengths_of(texts.prompt)
            lengths = np.concatenate([lengths, prompts[:, None]], axis=1)
    return lengths.shape[1] * np.minimum(lengths, tokens["max_length"]).max(axis=1)


def pair_texts(collator: Collator, rows: np.ndarray) -> PairTexts:
    """Texts of the comparisons `rows`, with the tokens that joint encoding keeps of their prompts."""
    data = collator.data
    table = data.comparisons
    responses = np.stack([table[name][rows] for name in ("a", "b")], axis=1).astype(np.int64)
    prompts = data.response_prompt[responses]
    response_tokens = collator.responses.lengths_of(responses)
    room = data.info["tokens"]["max_length"] - response_tokens
    prompt_tokens = np.minimum(collator.prompts.lengths_of(prompts), room)
    return PairTexts(prompts[:, 0], responses, prompt_tokens, response_tokens)
