"""Arguments of tool calls in the form in which a chat template shows them once, verbatim: an object, or JSON as text.

Many templates write `arguments | tojson`, which puts a JSON text into quotes a second time; others join a text to what
they write, and fail on an object.
"""

import json
from collections.abc import Callable
from typing import Literal

from pal_ds.data.records import CALL_KEYS, Message

Form = Literal["object", "text"]
_KEY, _VALUE = "topic", "Tern 46 dives"
_ARGUMENTS = {_KEY: _VALUE}


def form_needed(apply: Callable[[list[Message]], str | None]) -> Form | None:
    """Return the only form that a template shows well; None where it shows both, or neither.

    `apply` renders a conversation, or gives None where the template refuses it.
    """
    good: list[Form] = []
    for form in ("object", "text"):
        function = {"name": "look_up", "arguments": _ARGUMENTS}
        call = {"id": "call17abc", "type": "function", "function": function}
        answer: Message = {"role": "assistant", "content": None, "tool_calls": [call]}
        question: Message = {"role": "user", "content": "Look it up"}
        text = apply(with_arguments([question, answer], form))
        if text is not None and _shows_once(text):
            good.append(form)
    return good[0] if len(good) == 1 else None


def _shows_once(text: str) -> bool:
    """Return whether a text holds the arguments without quotes of their own and not as Python writes them."""
    return text.count(_VALUE) == 1 and "\\" + '"' not in text and f"'{_KEY}'" not in text


def with_arguments(messages: list[Message], form: Form | None) -> list[Message]:
    """The messages with the arguments of all their calls in this form; None leaves them as they are."""
    if form is None or not any(message.get(key) for message in messages for key in CALL_KEYS):
        return messages
    return [
        {key: _in_form(part, form) if key in CALL_KEYS else part for key, part in message.items()}
        for message in messages
    ]


def _in_form(calls: object, form: Form) -> object:
    """Calls, one call or its function, with their arguments in this form."""
    if isinstance(calls, list):
        return [_in_form(call, form) for call in calls]
    if not isinstance(calls, dict):
        return calls
    call = {key: _in_form(part, form) if key == "function" else part for key, part in calls.items()}
    if "arguments" in call:
        call["arguments"] = _converted(call["arguments"], form)
    return call


def _converted(arguments: object, form: Form) -> object:
    if form == "text":
        is_object = isinstance(arguments, dict | list)
        return json.dumps(arguments, ensure_ascii=False) if is_object else arguments
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except ValueError:
        return arguments  # no JSON: a text is what it is
    return value if isinstance(value, dict | list) else arguments
