"""Parse a JSON object into a Record, or a list of scored responses into several.

An error says where, what, the rule and the remedy.
"""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations
from typing import Any, TypeVar

from pal_ds.data.records import Record, Text, check_messages, is_empty, split_conversations
from pal_ds.errors import UserError
from pal_ds.users.ids import POPULATION_USER

REQUIRED_FORMS = (
    ("chosen", "rejected"),
    ("response_1", "response_2", "y"),
    ("response_features", "y"),
)
OPTIONAL_KEYS = ("user_id", "prompt", "prompt_features", "group", "margin", "split", "seen")
FACT_KEYS = ("controversial", "probability")
KNOWN_KEYS = tuple(
    dict.fromkeys([*OPTIONAL_KEYS, *FACT_KEYS, *(k for form in REQUIRED_FORMS for k in form)])
)
SPLIT_FIELD_NAMES = ("train", "dev", "test")


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" when some name is close, else nothing."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def parse_record(fields: object, where: str, extra_keys: str = "error") -> Record:
    """Check one object of either record form (design section 5) or the vector form."""
    if not isinstance(fields, Mapping):
        raise UserError(f"{where}: expected an object, found {type(fields).__name__}")
    unknown = [key for key in fields if key not in KNOWN_KEYS]
    form = _choose_form(fields, unknown, where)
    if unknown and extra_keys != "ignore":
        raise UserError(
            f"{where}: unknown key '{unknown[0]}'{nearest(unknown[0], KNOWN_KEYS)}; known keys are "
            f"{', '.join(KNOWN_KEYS)}. Remove it or set extra_keys: ignore"
        )
    common = {
        "user_id": _user_id(fields.get("user_id"), where),
        "label": -1 if "y" not in form else _label(fields["y"], where),
        "margin": _number(fields.get("margin"), where, "margin", 0.0, (0.0, _LARGEST_FLOAT32)),
        "group": _optional_name(fields.get("group"), where, "group"),
        "split": _split(fields.get("split"), where),
        "seen": _true_or_false(fields.get("seen"), where, "seen"),
        "controversial": _true_or_false(fields.get("controversial"), where, "controversial"),
        "probability": _number(fields.get("probability"), where, "probability", None, (0.0, 1.0)),
    }
    if "response_features" in form:
        return Record(**common, **_vectors(fields, where))
    prompt, responses = _texts(fields, form[:2], where)
    return Record(**common, prompt=prompt, responses=responses)


def _choose_form(fields: Mapping, unknown: list[str], where: str) -> tuple[str, ...]:
    present = [key for key, value in fields.items() if value is not None]
    started = [form for form in REQUIRED_FORMS if any(k in present for k in form if k != "y")]
    if len(started) > 1:
        raise UserError(
            f"{where}: keys of two record forms at once ({' and '.join(map(str, started))}); "
            "keep one form"
        )
    form = started[0] if started else REQUIRED_FORMS[1 if "y" in present else 0]
    for key in form:
        if key not in present:
            close = nearest(key, [k for k in (unknown or fields) if k not in KNOWN_KEYS])
            raise UserError(
                f"{where}: missing key '{key}'{close}; a record has prompt, chosen, rejected, or "
                "prompt, response_1, response_2, y, or response_features, y"
            )
    return form


def _user_id(value: object, where: str) -> str:
    if value is None:
        return POPULATION_USER
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise UserError(
            f"{where}: 'user_id' is {value!r}; give a non-empty text (or leave the key out for the "
            f"one user '{POPULATION_USER}')"
        )
    return str(value)


def _label(value: object, where: str) -> int:
    if isinstance(value, bool) or value not in (-1, 1):
        raise UserError(
            f"{where}: 'y' is {value!r}; it must be -1 (response_1 is preferred) or 1 "
            "(response_2 is preferred)"
        )
    return int(value)


DefaultT = TypeVar("DefaultT", float, None)

_LARGEST_FLOAT32 = 3.4028234663852886e38
"""A larger margin would be infinite in the tables."""


def _number(
    value: Any, where: str, key: str, default: DefaultT, bounds: tuple[float, float]
) -> float | DefaultT:
    if value is None:
        return default
    low, high = bounds
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (low <= value <= high) or math.isinf(value):
        limits = f"between {low:g} and {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise UserError(f"{where}: '{key}' is {value!r}; it must be a finite number {limits}")
    return float(value)


def _optional_name(value: object, where: str, key: str) -> str | None:
    if value is None or (isinstance(value, str) and value):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{where}: '{key}' is {value!r}; give a non-empty text or leave the key out")


def _split(value: object, where: str) -> str | None:
    if value is None or value in SPLIT_FIELD_NAMES:
        return value
    raise UserError(
        f"{where}: 'split' is {value!r}{nearest(str(value), SPLIT_FIELD_NAMES)}; it must be one of "
        f"{', '.join(SPLIT_FIELD_NAMES)}"
    )


def _true_or_false(value: object, where: str, key: str) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise UserError(f"{where}: '{key}' is {value!r}; it must be true or false")


def _text(value: object, where: str, key: str) -> Text:
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return check_messages(value, where, key)
    raise UserError(
        f"{where}: '{key}' is {type(value).__name__}; it must be text or a list of chat messages"
    )


def _texts(fields: Mapping, keys: tuple[str, ...], where: str) -> tuple[Text | None, tuple]:
    prompt = fields.get("prompt")
    prompt = None if prompt is None else _text(prompt, where, "prompt")
    responses = [_text(fields[key], where, key) for key in keys]
    if all(isinstance(r, list) and r[0]["role"] != "assistant" for r in responses):
        implicit, responses = _take_prompt(responses, where)
        prompt = _agree(prompt, implicit, where)
    for key, response in zip(keys, responses, strict=True):
        if is_empty(response):
            raise UserError(
                f"{where}: '{key}' is empty; every response needs text. Remove or mend the record"
            )
        if isinstance(response, list) and any(m["role"] != "assistant" for m in response):
            raise UserError(
                f"{where}: '{key}' holds messages that are not the assistant's; put the "
                "conversation so far in 'prompt', or in both responses alike"
            )
    return prompt, tuple(responses)


def _take_prompt(responses: list, where: str) -> tuple[list, list]:
    shared, problem = split_conversations(*responses)
    if problem:
        raise UserError(f"{where}: {problem}")
    return responses[0][:shared], [response[shared:] for response in responses]


def _agree(prompt: Text | None, implicit: list, where: str) -> Text:
    """The implicit prompt, once a prompt that is also given explicitly agrees with it."""
    contents = {m["content"].strip() for m in implicit}
    agrees = prompt == implicit or (isinstance(prompt, str) and prompt.strip() in contents)
    if prompt is None or agrees:
        return implicit
    raise UserError(
        f"{where}: 'prompt' differs from the messages that both responses begin with; give the "
        "prompt in one place"
    )


def _vector(value: Any, where: str, key: str) -> tuple[float, ...]:
    is_list = isinstance(value, list | tuple) and len(value) > 0
    if not is_list or not all(
        isinstance(x, int | float) and not isinstance(x, bool) for x in value
    ):
        raise UserError(f"{where}: '{key}' must be a non-empty list of numbers")
    if not all(map(math.isfinite, value)):
        raise UserError(f"{where}: '{key}' holds a number that is not finite; mend or drop the row")
    return tuple(map(float, value))


def _vectors(fields: Mapping[str, Any], where: str) -> dict:
    if fields.get("prompt") is not None:
        raise UserError(
            f"{where}: 'prompt' is text beside 'response_features'; a record holds texts or "
            "vectors, never both. Use prompt_features"
        )
    pair = fields["response_features"]
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise UserError(f"{where}: 'response_features' must be a list of two vectors")
    vectors = [_vector(v, where, f"response_features[{i}]") for i, v in enumerate(pair)]
    prompt = fields.get("prompt_features")
    prompt = None if prompt is None else _vector(prompt, where, "prompt_features")
    sizes = [len(v) for v in (*vectors, *([] if prompt is None else [prompt]))]
    if len(set(sizes)) != 1:
        raise UserError(
            f"{where}: vectors of sizes {sizes} in one record; all vectors must have one size"
        )
    return {"prompt_features": prompt, "response_features": tuple(vectors)}


def is_list(fields: object) -> bool:
    """Return whether an object is a list of responses and not a comparison of two."""
    return isinstance(fields, Mapping) and "scores" in fields


def check_list(fields: Mapping[str, Any], where: str) -> tuple[str, list[Any], list[float]]:
    """(the key of the responses, the responses, what the user thinks of each).

    Raises:
        UserError: fewer than two responses, another number of scores, or a score that is no finite number.
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
        number = isinstance(score, int | float) and not isinstance(score, bool)
        if not number or not math.isfinite(score):
            raise UserError(f"{where}: 'scores' holds {score!r}; each must be a finite number.")
    return key, responses, [float(score) for score in scores]


def pairs_of_list(fields: Mapping[str, Any], where: str) -> Iterator[dict[str, object] | None]:
    """Each two responses as a comparison's fields, in the order of the list; None for two of equal score.

    The mean logistic loss over these pairs is the masked list-wise ranking loss of DSP (arXiv 2309.03126): a batch
    holds each response once, so r of them cost r encodings, and `train.shuffle_unit: item` keeps them together.
    """
    key, responses, scores = check_list(fields, where)
    rest = {name: value for name, value in fields.items() if name not in (key, "scores")}
    for i, j in combinations(range(len(responses)), 2):
        if scores[i] == scores[j]:
            yield None
            continue
        both = responses[i], responses[j]
        pair = {"response_1": both[0], "response_2": both[1]}
        if key == "response_features":
            pair = {key: list(both)}
        yield {**rest, **pair, "y": -1 if scores[i] > scores[j] else 1}
