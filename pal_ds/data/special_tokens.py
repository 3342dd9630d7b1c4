"""The tokens around a text and between its turns: as a tokenizer adds them, and as its chat template writes them."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from pal_ds.data.chat_template import PROBES, ChatTemplate
from pal_ds.data.records import as_messages
from pal_ds.errors import UserError

Tokenise = Callable[[list[str]], dict[str, Any]]
"""Texts to input_ids and offset_mapping, without special tokens of the tokenizer's own."""


def turn_end(
    template: ChatTemplate, tokenise: Tokenise, end_ids: list[int]
) -> tuple[list[int], list[list[int]] | None]:
    """(the end of a text, all that may stand for it): the token with which the template ends a turn.

    A policy stops at this token. The template may write a line feed behind it, and programs append the end of
    sequence: none of these makes another text.
    """
    question, answer = as_messages(PROBES[0], "user"), as_messages(PROBES[1], "assistant")
    text = template.apply([*question, *answer])
    if text is None or PROBES[1] not in text:
        return end_ids, None
    batch = tokenise([text])
    start = text.index(PROBES[1]) + len(PROBES[1])
    pairs = zip(batch["input_ids"][0], batch["offset_mapping"][0], strict=True)
    tail = [token for token, (low, _) in pairs if low >= start]
    special = {*template.tokenizer.all_special_ids, *template.tokenizer.added_tokens_decoder}
    if not tail or tail[0] not in special or tail == end_ids:
        return end_ids, None
    turn = tail[:1]
    variants = [turn, tail]
    if end_ids != turn:
        variants += [end_ids, turn + end_ids, tail + end_ids]
    return turn, [list(v) for v in dict.fromkeys(map(tuple, variants))]


def user_marker(template: ChatTemplate, tokenise: Tokenise) -> list[int] | None:
    """Tokens that open every user message; None where they are not always the same."""
    first, answer, second = PROBES
    turns = [*as_messages(first, "user"), *as_messages(answer, "assistant")]
    text = template.apply(turns + as_messages(second, "user"))
    if text is None or not all(probe in text for probe in PROBES):
        return None
    before_first = text[: text.index(first)]
    before_second = text[text.index(answer) + len(answer) : text.index(second)]
    shared = _common_suffix(before_first, before_second)
    batch = tokenise([text])
    ids, offsets = batch["input_ids"][0], batch["offset_mapping"][0]
    ends = text.index(first), text.index(second)
    markers = [_inside(ids, offsets, end - shared, end) for end in ends]
    width = _common_suffix(*markers)
    return markers[0][len(markers[0]) - width :] or None


def special_ids(tokenizer, name: str) -> tuple[list[int], list[int]]:
    """(prefix, end) as the tokenizer adds them; one end-of-sequence token if it adds no end."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    width = len(bare)
    start = next((s for s in range(len(full) - width + 1) if full[s : s + width] == bare), None)
    if start is None:
        raise UserError(
            f"tokenizer {name}: its special tokens change the text's own tokens; set "
            "special_tokens: false"
        )
    prefix, end = full[:start], full[start + width :]
    if not end:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {name}: has no end token (eos) to append to responses; give it one or "
                "set special_tokens: false"
            )
        end = [tokenizer.eos_token_id]
    return prefix, end


def _common_suffix(first: Sequence, second: Sequence) -> int:
    alike = (a == b for a, b in zip(reversed(first), reversed(second), strict=False))
    return sum(itertools.takewhile(bool, alike))


def _inside(ids: list[int], offsets: list, start: int, stop: int) -> list[int]:
    """The tokens that lie wholly in characters [start, stop)."""
    return [
        token
        for token, (low, high) in zip(ids, offsets, strict=True)
        if low >= start and high <= stop and high > low
    ]
