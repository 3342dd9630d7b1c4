"""Cuts an update into packed micro-batches: a prompt's comparisons together, ranks' tokens even."""

import bisect
import heapq
from typing import NamedTuple

import numpy as np

from pal_ds.data.collator import Collator

COPIES_PER_TOKEN = 12
"""Tokens of which a response holds the keys and values for the memory of a token of its own: in a Llama layer without
grouped heads a token keeps 24 hidden sizes for the backward pass, a copied key with its value 2."""


class PairTexts(NamedTuple):
    """The texts of n comparisons and what they cost."""

    prompt: np.ndarray
    """Row of each one's prompt, int64 [n]."""
    response: np.ndarray
    """Rows of both responses, int64 [n, 2]."""
    prompt_tokens: np.ndarray
    """Tokens of the prompt in front of each response, int64 [n, 2]: truncation depends on the response."""
    response_tokens: np.ndarray
    """Tokens of each response, int64 [n, 2]."""
    joint: bool
    """True if a response looks at its prompt, and so holds a copy of the prompt's keys and values."""


def split_by_cost(
    texts: PairTexts, world_size: int, most_pairs: int, most_tokens: int | None
) -> list[list[np.ndarray]]:
    """Cuts an update into [micro-step][rank] positions: comparisons of one prompt together, ranks' costs even.

    Every rank gets the same number of micro-steps, as few as Graham's rule can fill; a position list is ascending and
    may be empty where an update is smaller than the world. A comparison dearer than the budget makes a run of its
    own: it cannot be cut. Which comparisons form the update is not touched.

    Args:
        most_pairs: comparisons in a run.
        most_tokens: distinct tokens in a run, with one for every COPIES_PER_TOKEN copied; None sets no bound.
    """
    num_pairs = len(texts.prompt)
    # A prompt with more than a rank's share of the update is computed on several, lest the others wait.
    pieces = _pieces(texts, min(most_pairs, -(-num_pairs // world_size)), most_tokens)
    total = sum(cost for cost, _ in pieces)
    budget = total if most_tokens is None else most_tokens
    # Pieces dearer than the budget cost no more than a run each.
    by_tokens = min(-(-total // (world_size * budget)), -(-len(pieces) // world_size))
    num_steps = bisect.bisect_left(
        range(-(-len(pieces) // world_size)),
        True,
        lo=max(-(-num_pairs // (world_size * most_pairs)), by_tokens),
        key=lambda steps: _fill(pieces, steps * world_size, most_pairs, budget) is not None,
    )
    runs = _fill(pieces, num_steps * world_size, most_pairs, budget)
    assert runs is not None, "a run for each piece has room for all"
    positions = [np.sort(np.array(run, np.int64)) for run in runs]
    return [positions[first : first + world_size] for first in range(0, len(runs), world_size)]


Piece = tuple[int, list[int]]
"""Cost in tokens and the positions of some comparisons of one prompt."""


def _pieces(texts: PairTexts, most_pairs: int, most_tokens: int | None) -> list[Piece]:
    """The comparisons of each prompt, cut where they exceed a bound by themselves."""
    pieces: list[Piece] = []
    seen: set[tuple[str, int]] = set()
    last_prompt = -1
    for position in np.argsort(texts.prompt, kind="stable").tolist():
        tokens = _text_costs(texts, position)
        new = sum(cost for key, cost in tokens.items() if key not in seen)
        cost, members = pieces[-1] if pieces else (0, [])
        full = len(members) == most_pairs or (most_tokens is not None and cost + new > most_tokens)
        if texts.prompt[position] != last_prompt or full:
            pieces.append((sum(tokens.values()), [position]))
            seen, last_prompt = set(tokens), texts.prompt[position]
        else:
            pieces[-1] = (cost + new, [*members, position])
            seen |= set(tokens)
    return pieces


def _text_costs(texts: PairTexts, position: int) -> dict[tuple[str, int], int]:
    """Compute the cost of each distinct text of one comparison; keys are unique among those of its prompt."""
    tokens = {}
    for side in (0, 1):
        kept = int(texts.prompt_tokens[position, side])
        tokens["prompt", kept] = kept
        response = int(texts.response[position, side])
        copied = kept // COPIES_PER_TOKEN if texts.joint else 0
        tokens["response", response] = int(texts.response_tokens[position, side]) + copied
    return tokens


def _fill(
    pieces: list[Piece], num_runs: int, most_pairs: int, budget: int
) -> list[list[int]] | None:
    """Each piece, dearest first, into the cheapest run with room (Graham's LPT rule); None where some finds none.

    A piece dearer than the budget fits into an empty run only.
    """
    runs: list[list[int]] = [[] for _ in range(num_runs)]
    cheapest = [(0, run) for run in range(num_runs)]
    for cost, members in sorted(pieces, key=lambda piece: (-piece[0], piece[1][0])):
        without_room = []
        while cheapest and len(runs[cheapest[0][1]]) + len(members) > most_pairs:
            without_room.append(heapq.heappop(cheapest))
        if not cheapest:
            return None
        tokens, run = heapq.heappop(cheapest)
        if runs[run] and tokens + cost > budget:
            return None
        runs[run] += members
        for entry in ((tokens + cost, run), *without_room):
            if len(runs[entry[1]]) < most_pairs:
                heapq.heappush(cheapest, entry)
    return runs


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
