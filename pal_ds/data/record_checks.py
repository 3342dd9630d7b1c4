"""Checks of records, whoever made them: a source of somebody's own may put anything into their fields."""

from collections.abc import Iterator
from numbers import Real
from typing import Any

import numpy as np

from pal_ds.data.records import CALL_KEYS, REASONING_KEYS, Record

LARGEST_FLOAT32 = 3.4028234663852886e38
"""A larger number would be infinite in the tables."""
_TEXT = "a text, or a list of messages with texts in `role` and `content`"


def fault_of(record: Record) -> str | None:
    """Return the first thing that is wrong with a record's fields, with the rule; None where all is well.

    >>> fault_of(Record("mia", 1, responses=("a", "b")))
    >>> fault_of(Record(7, 1, responses=("a", "b")))
    'user_id is 7; it must be a text that is not blank'
    """
    return next(_faults(record), None)


def _faults(record: Record) -> Iterator[str]:
    for name in ("user_id", "group"):
        value = getattr(record, name)
        is_unsaid = value is None and name == "group"
        if not is_unsaid and not (isinstance(value, str) and value.strip()):
            yield f"{name} is {value!r:.80}; it must be a text that is not blank"
    if not _is_number(record.label) or record.label not in (-1, 0, 1):
        yield f"label is {record.label!r:.80}; it must be -1, 1, or 0 for a tie"
    yield from _faults_of_contents(record)
    if not (_is_number(record.margin) and 0 <= record.margin <= LARGEST_FLOAT32):
        yield f"margin is {record.margin!r:.80}; it must be a finite number, 0 or more"
    for name in ("seen", "controversial"):
        value = getattr(record, name)
        if value is not None and not isinstance(value, bool | np.bool_):
            yield f"{name} is {value!r:.80}; it must be True, False or None"
    if record.label == 0 and record.margin:
        yield f"margin is {record.margin} for a tie, which has none"
    yield from _faults_of_choice(record)


def _faults_of_contents(record: Record) -> Iterator[str]:
    """Yield faults of what is compared and of the prompt: texts, or vectors."""
    given = [
        name for name in ("responses", "response_features") if getattr(record, name) is not None
    ]
    if len(given) != 1:
        yield "it must have either responses or response_features"
        return
    pair = getattr(record, given[0])
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        yield f"{given[0]} is {pair!r:.80}; it must be a pair"
        return
    of_prompt = "prompt" if given[0] == "responses" else "prompt_features"
    named = [(f"{given[0]}[{place}]", value) for place, value in enumerate(pair)]
    prompt = getattr(record, of_prompt)
    named += [] if prompt is None else [(of_prompt, prompt)]
    is_right, rule = (_is_text, _TEXT) if of_prompt == "prompt" else (_is_vector, "finite numbers")
    for name, value in named:
        if not is_right(value):
            yield f"{name} is {value!r:.80}; it must be {rule}"
    if of_prompt == "prompt" and record.prompt_features is not None:
        yield "prompt_features beside responses; a record holds texts or vectors"
    if of_prompt != "prompt" and record.prompt is not None:
        yield "prompt beside response_features; a record holds texts or vectors"
    tools = record.tools
    if tools is not None and not (isinstance(tools, list) and all(map(_is_dict, tools))):
        yield f"tools is {tools!r:.80}; it must be a list of dicts"


def _faults_of_choice(record: Record) -> Iterator[str]:
    """Yield faults of the probability, which of a soft label is what the user said."""
    chance = record.probability
    if chance is not None and not (_is_number(chance) and 0 <= chance <= 1):
        yield f"probability is {chance!r:.80}; it must be a number between 0 and 1"
    elif record.soft and (chance is None or record.label == 0):
        yield "a soft label needs a probability, and is no tie"
    elif record.soft and chance is not None and (chance - 0.5) * record.label < 0:
        yield f"label is {record.label} beside the soft label {chance}; it must be the likelier choice"


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _is_text(value: object) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_message, value))
    return isinstance(value, str)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        return False
    content = value.get("content", value)
    says_more = any(value.get(key) for key in (*CALL_KEYS, *REASONING_KEYS))
    return isinstance(content, str) or (content is None and says_more)


def _is_vector(value: object) -> bool:
    if not isinstance(value, tuple | list | np.ndarray) or not len(value):
        return False
    if set(map(type, value)) == {float}:
        # Long vectors: one pass in C.
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        is_real = value.ndim == 1 and value.dtype.kind in "fiu"
        return is_real and bool((np.abs(value) <= LARGEST_FLOAT32).all())
    return all(_is_number(number) and abs(number) <= LARGEST_FLOAT32 for number in value)
