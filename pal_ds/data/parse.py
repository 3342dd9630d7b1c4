"""Parse a JSON object into a Record.

An error says where, what, the rule and the remedy.
"""

import difflib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pal_ds.data.record_checks import LARGEST_FLOAT32
from pal_ds.data.records import (
    Record,
    Text,
    check_messages,
    check_tools,
    is_empty,
    num_shared_messages,
    same_messages,
)
from pal_ds.errors import UserError
from pal_ds.users.ids import POPULATION_USER

REQUIRED_FORMS = (
    ("chosen", "rejected"),
    ("response_1", "response_2", "y"),
    ("response_features", "y"),
)
OPTIONAL_KEYS = (
    "user_id",
    "prompt",
    "tools",
    "prompt_features",
    "group",
    "margin",
    "split",
    "seen",
    "tie",
)
FACT_KEYS = ("controversial", "probability")
NOTE_KEYS = ("gain", "rank")
"""Keys that `ask` leaves in its lines; nothing reads them."""
KNOWN_KEYS = tuple(
    dict.fromkeys(
        [*OPTIONAL_KEYS, *FACT_KEYS, *NOTE_KEYS, *(k for form in REQUIRED_FORMS for k in form)]
    )
)
SPLIT_FIELD_NAMES = ("train", "dev", "test")


def is_number(value: object) -> bool:
    """Return whether a JSON value is a number, finite or not, not true or false, and no larger than floats are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) <= sys.float_info.max


def _is_name(value: object) -> bool:
    """Return whether a JSON value names somebody; white space alone would be a user whom nobody can find again."""
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, int) and not isinstance(value, bool)


def _is_true_or_false(value: object) -> bool:
    return isinstance(value, bool)


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "user_id": (
        _is_name,
        f"give a text that is not blank (or leave the key out for the one user '{POPULATION_USER}')",
    ),
    "y": (
        lambda value: not isinstance(value, bool) and value in (-1, 0, 1),
        "it must be -1 (response_1 is preferred), 1 (response_2 is preferred) or 0 (a tie)",
    ),
    "margin": (
        lambda value: is_number(value) and 0 <= value <= LARGEST_FLOAT32,
        f"it must be a finite number between 0 and {LARGEST_FLOAT32:g}",
    ),
    "group": (_is_name, "give a text that is not blank, or leave the key out"),
    "split": (
        lambda value: value in SPLIT_FIELD_NAMES,
        f"it must be one of {', '.join(SPLIT_FIELD_NAMES)}",
    ),
    "seen": (_is_true_or_false, "it must be true or false"),
    "controversial": (_is_true_or_false, "it must be true or false"),
    "tie": (_is_true_or_false, "it must be true or false"),
    "probability": (
        lambda value: is_number(value) and 0 <= value <= 1,
        "it must be a finite number between 0 and 1",
    ),
}
"""What the one value of a key may be, unless it is null, and how a message says it."""


def nearest(name: str, names: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" when some name is close, else nothing."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def parse_record(fields: object, where: str, extra_keys: str = "error") -> Record:
    """Check one object of a form that REQUIRED_FORMS lists. Raises UserError with `where`, the rule and the remedy."""
    if not isinstance(fields, Mapping):
        raise UserError(
            f"{where}: expected an object, found {type(fields).__name__}; JSON Lines hold one object a line. Of a file "
            "that is one list: jq -c '.[]' FILE > LINES.jsonl"
        )
    unknown = [key for key in fields if key not in KNOWN_KEYS]
    _checked(fields, "tie", where)  # it may stand for y
    form = _choose_form(fields, unknown, where)
    if unknown and extra_keys != "ignore":
        raise UserError(
            f"{where}: unknown key '{unknown[0]}'{nearest(unknown[0], KNOWN_KEYS)}; known keys are "
            f"{', '.join(KNOWN_KEYS)}. Remove it or set extra_keys: ignore"
        )
    values = {key: _checked(fields, key, where) for key in _RULES if key != "y" or "y" in form}
    user_id, group = values["user_id"], values["group"]
    y, tie = values.pop("y", fields.get("y")), values.pop("tie")
    values |= _choice(y, tie, values["probability"], form, where)
    if values["label"] == 0 and values["margin"]:
        raise UserError(
            f"{where}: 'margin' is {values['margin']} for a tie, which has none; leave it out"
        )
    values |= {
        "user_id": POPULATION_USER if user_id is None else str(user_id),
        "margin": float(values["margin"] or 0.0),
        "group": None if group is None else str(group),
    }
    if "response_features" in form:
        return Record(**values, **_vectors(fields, where))
    prompt, responses = _texts(fields, form[:2], where)
    tools = fields.get("tools")
    tools = None if tools is None else check_tools(tools, where) or None
    return Record(**values, prompt=prompt, responses=responses, tools=tools)


def _choice(
    y: float | None, tie: bool | None, probability: float | None, form: tuple[str, ...], where: str
) -> dict[str, int]:
    """(`label`, `soft`) of a record of this form. Raises UserError where its keys contradict each other."""
    if "y" not in form:
        if tie or (y is not None and y == 0):
            said = "'tie' is true" if tie else f"'y' is {y!r}, a tie,"
            raise UserError(
                f"{where}: {said} beside 'chosen' and 'rejected'; give the two of a tie as response_1 and response_2"
            )
        if y is not None:
            raise UserError(
                f"{where}: 'y' is {y!r} beside 'chosen' and 'rejected', which say already what is preferred; leave 'y' "
                "out"
            )
        return {"label": -1}
    if tie is not None and y is not None and tie != (y == 0):
        raise UserError(f"{where}: 'tie' is {str(tie).lower()} beside y {y}; leave one of them out")
    if tie and probability is not None:
        raise UserError(f"{where}: 'tie' is true beside a probability; leave one of them out")
    if tie or y == 0:
        return {"label": 0}
    if y is not None:
        return {"label": int(y)}
    assert probability is not None, "a record that does not say which response is preferred"
    return {"label": 1 if probability >= 0.5 else -1, "soft": True}


def _choose_form(fields: Mapping, unknown: list[str], where: str) -> tuple[str, ...]:
    present = [key for key, value in fields.items() if value is not None]
    started = [form for form in REQUIRED_FORMS if any(k in present for k in form if k != "y")]
    if len(started) > 1:
        raise UserError(
            f"{where}: keys of two record forms at once ({' and '.join(map(str, started))}); "
            "keep one form"
        )
    form = started[0] if started else REQUIRED_FORMS[1 if "y" in present else 0]
    is_answered = fields.get("tie") is True or "probability" in present
    for key in form:
        if key not in present and not (key == "y" and is_answered):
            others = [k for k in (unknown or fields) if k not in KNOWN_KEYS]
            written = difflib.get_close_matches(key, map(str, others), n=1)
            close = f" (did you mean '{key}' by '{written[0]}'?)" if written else ""
            raise UserError(
                f"{where}: missing key '{key}'{close}; a record has prompt, chosen, rejected, or "
                "prompt, response_1, response_2, y, or response_features, y; in place of y, probability or tie"
            )
    return form


def _checked(fields: Mapping, key: str, where: str) -> Any:
    """The value of a key of `_RULES`, None where there is none."""
    value, (is_good, rule) = fields.get(key), _RULES[key]
    if value is not None and not is_good(value):
        close = nearest(str(value), SPLIT_FIELD_NAMES) if key == "split" else ""
        raise UserError(f"{where}: '{key}' is {value!r}{close}; {rule}")
    return value


def check_name(fields: Mapping, key: str, where: str) -> str | None:
    """The user id or group of a record, None where it names none. Raises UserError for what is no name."""
    value = _checked(fields, key, where)
    return None if value is None else str(value)


def text_of_field(value: object, where: str, key: str) -> Text:
    """A text or chat messages; a UserError for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return check_messages(value, where, key)
    raise UserError(
        f"{where}: '{key}' is {type(value).__name__}; it must be text or a list of chat messages"
    )


def _texts(fields: Mapping, keys: tuple[str, ...], where: str) -> tuple[Text | None, tuple]:
    prompt = fields.get("prompt")
    prompt = None if prompt is None else text_of_field(prompt, where, "prompt")
    responses: list[Text] = [text_of_field(fields[key], where, key) for key in keys]
    whole = [r for r in responses if isinstance(r, list) and r[0]["role"] != "assistant"]
    if len(whole) == len(responses):
        shared = num_shared_messages(whole[0], whole[1], where)
        prompt = _agree(prompt, whole[0][:shared], where)
        responses = [conversation[shared:] for conversation in whole]
    for key, response in zip(keys, responses, strict=True):
        check_response(response, where, key)
    return prompt, tuple(responses)


def check_response(response: Text, where: str, key: str) -> None:
    """Raise UserError for a response without text, or with messages that are not the assistant's."""
    if is_empty(response):
        raise UserError(
            f"{where}: '{key}' is empty; every response needs text. Remove or mend the record"
        )
    if isinstance(response, list) and any(m["role"] != "assistant" for m in response):
        raise UserError(
            f"{where}: '{key}' holds messages that are not the assistant's; put the "
            "conversation so far in 'prompt', or in both responses alike"
        )


def _agree(prompt: Text | None, implicit: list, where: str) -> Text:
    """The implicit prompt, once a prompt that is also given explicitly agrees with it."""
    contents = {(m["content"] or "").strip() for m in implicit}
    if isinstance(prompt, str):
        agrees = prompt.strip() in contents
    else:
        agrees = prompt is not None and same_messages(prompt, implicit)
    if prompt is None or agrees:
        return implicit
    raise UserError(
        f"{where}: 'prompt' differs from the messages that both responses begin with; give the "
        "prompt in one place"
    )


def _vector(value: Any, where: str, key: str) -> tuple[float, ...]:
    if not isinstance(value, list | tuple) or not value or not all(map(is_number, value)):
        raise UserError(f"{where}: '{key}' must be a non-empty list of numbers")
    if not all(abs(number) <= LARGEST_FLOAT32 for number in value):
        raise UserError(
            f"{where}: '{key}' holds a number that is not finite in float32; mend or drop the row"
        )
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
