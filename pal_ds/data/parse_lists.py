"""A list of scored responses to one prompt, as the comparisons of each two of them."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from pal_ds.data.parse import is_number, parse_record, text_of_field
from pal_ds.data.records import Record, is_empty
from pal_ds.errors import UserError

LIST_KEYS = ("responses", "scores")
"""Keys of a list beside those of a comparison."""
_OF_PAIRS = ("chosen", "rejected", "response_1", "response_2")
_SAID_BY_SCORES = (*_OF_PAIRS, "y", "tie", "probability")
"""Keys of a comparison of two that a list has no use for: its scores say what is preferred."""


def is_list(fields: object) -> bool:
    """Return whether an object is a list of responses and not a comparison of two.

    >>> is_list({"responses": ["a", "b"]}), is_list({"chosen": "a", "rejected": "b", "responses": 2})
    (True, False)
    """
    if not isinstance(fields, Mapping):
        return False
    return "scores" in fields or ("responses" in fields and not any(k in fields for k in _OF_PAIRS))


def records_of_fields(
    fields: object, where: str, dropped: Counter[str], extra_keys: str = "error"
) -> Iterator[Record]:
    """The comparison that an object describes, or several of a list; ties of a list are counted in `dropped`.

    Raises:
        UserError: as `parse_record` and `pairs_of_list` do.
    """
    if not isinstance(fields, Mapping) or not is_list(fields):
        yield parse_record(fields, where, extra_keys)
        return
    for pair in pairs_of_list(fields, where):
        if pair is None:
            dropped["tie"] += 1
        else:
            yield parse_record(pair, where, extra_keys)


def check_list(fields: Mapping[str, Any], where: str) -> tuple[str, list[Any], list[float]]:
    """(the key of the responses, the responses, what the user thinks of each).

    Raises:
        UserError: fewer than two responses, another number of scores, a response that is no text, or a score that is
            no finite number.
    """
    key = "response_features" if "response_features" in fields else "responses"
    responses, scores = fields.get(key), fields.get("scores")
    if not isinstance(responses, list) or len(responses) < 2:
        raise UserError(f"{where}: '{key}' must be a list of two or more candidates.")
    if not isinstance(scores, list) or len(scores) != len(responses):
        raise UserError(
            f"{where}: 'scores' must be a list of {len(responses)} numbers, what the user thinks of each candidate."
        )
    for score in scores:
        if not is_number(score) or not math.isfinite(score):
            raise UserError(f"{where}: 'scores' holds {score!r}; each must be a finite number.")
    for place, response in enumerate(responses if key == "responses" else ()):
        # Their names in a comparison, response_1 and response_2, say nothing of the place in a list.
        if is_empty(text_of_field(response, where, f"responses[{place}]")):
            raise UserError(
                f"{where}: 'responses[{place}]' is empty; every response needs text. Remove or mend the record"
            )
    return key, responses, [float(score) for score in scores]


def pairs_of_list(fields: Mapping[str, Any], where: str) -> Iterator[dict[str, object] | None]:
    """Each two responses as a comparison's fields, in the order of the list; None for two of equal score.

    The mean logistic loss over these pairs is the masked list-wise ranking loss of DSP (arXiv 2309.03126): a batch
    holds each response once, so r of them cost r encodings, and `train.shuffle_unit: item` keeps them together.

    Raises:
        UserError: as `check_list` does, or a key that says otherwise what is preferred.
    """
    key, responses, scores = check_list(fields, where)
    for other in _SAID_BY_SCORES:
        if fields.get(other) is not None:
            raise UserError(
                f"{where}: '{other}' beside 'scores', which say what is preferred in a list; leave one of them out"
            )
    rest = {name: value for name, value in fields.items() if name not in (key, "scores")}
    for i, j in combinations(range(len(responses)), 2):
        if scores[i] == scores[j]:
            yield None
            continue
        pair = {"response_1": responses[i], "response_2": responses[j]}
        if key == "response_features":
            pair = {key: [responses[i], responses[j]]}
        yield {**rest, **pair, "y": -1 if scores[i] > scores[j] else 1}
