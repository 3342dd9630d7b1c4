"""A preference record, the form every source yields, and the chat messages that its texts may be."""

import json
from dataclasses import dataclass, field
from typing import Any

from pal_ds.errors import UserError
from pal_ds.io.text_files import parse_json

Message = dict[str, Any]
"""A chat message as chat templates take it: `role`, `content`, and what else it has (`tool_calls`, ...)."""
Tools = list[dict[str, Any]]
"""Tools that the assistant may call, as JSON schemas for the chat template."""
Text = str | list[Message]
"""A plain string, or chat messages `[{"role": ..., "content": ...}, ...]`."""


REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
CALL_KEYS = ("tool_calls", "function_call")
"""Keys of a message that say something beside its content, or in its place."""
OTHER_SHOWN_KEYS = {
    *("name", "tool_responses", "recipient", "channel"),
    *("thought", "thoughts", "documents", "tools", "functions"),
}
"""Keys that say something as well, of which a template may show nothing."""
_SHOWN_KEYS = {
    *("role", "content", "tool_call_id", "prefix"),
    *OTHER_SHOWN_KEYS,
    *REASONING_KEYS,
    *CALL_KEYS,
}
"""Keys of a message that chat templates show. Others (`id`, `timestamp`) are notes on where it comes from."""


@dataclass(frozen=True, slots=True)
class Record:
    """`user_id` compared two responses to `prompt`. Texts, or vectors in their place, never both.

    `label` is y of the field's triple: -1 when responses[0] is preferred, +1 when responses[1] is, 0 for a tie.
    """

    user_id: str
    label: int
    prompt: Text | None = None
    responses: tuple[Text, Text] | None = None
    prompt_features: tuple[float, ...] | None = None
    response_features: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    tools: Tools | None = None
    """They belong to the prompt."""
    margin: float = 0.0
    """Strength of the preference, >= 0; the loss asks for at least this margin."""
    group: str | None = None
    split: str | None = None
    """train, dev or test, read only by `split: field`."""
    seen: bool | None = None
    """False holds this user's every comparison out of training; None leaves it to `unseen_user_fraction`."""
    controversial: bool | None = None
    """True if the dataset's users disagree on this pair; None where its source cannot know."""
    probability: float | None = None
    """Known probability that responses[1] is preferred (synthetic worlds)."""
    soft: bool = False
    """True where `probability` is itself the annotation, say the share of annotators who chose responses[1]; `label`
    is then the likelier choice (+1 at one half)."""
    where: str | None = field(default=None, compare=False, repr=False)
    """Place of the row that it was read from, for messages."""


def check_messages(messages: list, where: str, key: str) -> list[Message]:
    """`messages` whole, for the chat template; parts of text are joined, and keys without a value left out.

    Raises:
        UserError: a message is no object, has no role or nothing to say, or holds what is no text (a picture).
    """
    if not messages:
        raise UserError(f"{where}: '{key}' is an empty list of messages; give at least one message")
    return [
        _check_message(message, where, f"'{key}' message {position}")
        for position, message in enumerate(messages)
    ]


def _check_message(message: object, where: str, name: str) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(
            f"{where}: {name} is {_short(message)}; a message is an object with text in "
            '"role" and "content"'
        )
    # A column of a table has every key in every row.
    kept = {key: value for key, value in message.items() if value is not None}
    content = message.get("content")
    if isinstance(content, list):
        content = _joined(content, where, name)
    if isinstance(content, str):
        return {**kept, "content": content}
    if content is None and any(kept.get(part) for part in (*CALL_KEYS, *REASONING_KEYS)):
        # The form of OpenAI's API; templates look for it.
        return {**kept, "content": None}
    raise UserError(
        f"{where}: {name} is {_short(message)}; a message is an object with text in "
        '"role" and "content", or with tool_calls'
    )


def _joined(parts: list, where: str, name: str) -> str:
    """The text of `[{"type": "text", "text": ...}, ...]`, part after part."""
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            raise UserError(
                f"{where}: {name} holds {_short(part)}; the parts of a content must be of text"
            )
        texts.append(text)
    return "".join(texts)


def shown(message: Message) -> Message:
    """A message without the notes that no template shows: what makes two messages the same.

    >>> shown({"role": "user", "content": "Tea?", "id": "m-17", "timestamp": 1700000000})
    {'role': 'user', 'content': 'Tea?'}
    """
    return {key: value for key, value in message.items() if key in _SHOWN_KEYS}


def same_messages(first: list[Message], second: list[Message]) -> bool:
    """Return whether two conversations say the same, whatever notes their messages carry."""
    return list(map(shown, first)) == list(map(shown, second))


def check_tools(value: object, where: str) -> Tools:
    """The tools of a conversation: a list of JSON schemas, or the JSON of such a list. Raises UserError."""
    if isinstance(value, str):
        # Tables keep schemas of many shapes as text.
        value = parse_json(value, f"{where}: 'tools'")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(f"{where}: 'tools' must be a list of objects, the schemas of the tools")
    return value


def as_messages(text: Text, role: str) -> list[Message]:
    """Chat messages as they are; a plain string as one message of `role`."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def render_plain(text: Text) -> str:
    """Messages as "role: content" paragraphs (for tokenizers without a chat template).

    A lone assistant message is its content: it stands where a plain response would. Reasoning stands before the
    content, calls of tools after it, as JSON.
    """
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0]["role"] == "assistant":
        return _said(text[0])
    return "\n\n".join(f"{message['role']}: {_said(message)}" for message in text)


def _said(message: Message) -> str:
    """All that a message says. One of role and content alone is its content."""
    parts = [str(message[key]) for key in REASONING_KEYS if message.get(key)]
    parts += [message["content"]] if message["content"] or not parts else []
    parts += [
        json.dumps(message[key], ensure_ascii=False, sort_keys=True)
        for key in CALL_KEYS
        if message.get(key)
    ]
    return "\n".join(part for part in parts if part) if len(parts) > 1 else parts[0] or ""


def is_empty(text: Text) -> bool:
    """True when there is nothing to read: no text, or a last message that says nothing."""
    return not (text if isinstance(text, str) else _said(text[-1])).strip()


def num_shared_messages(first: list[Message], second: list[Message], where: str) -> int:
    """Number of leading messages two conversations share as an implicit prompt.

    Each keeps at least its last message. Raises UserError unless all that remains is the assistant's.
    """
    limit = min(len(first), len(second)) - 1
    shared = 0
    while shared < limit and shown(first[shared]) == shown(second[shared]):
        shared += 1
    for message in (*first[shared:], *second[shared:]):
        if message["role"] != "assistant":
            raise UserError(
                f"{where}: the responses differ from message {shared} on, but that part holds a "
                f"message of role '{message['role']}'; only the assistant's messages may differ"
            )
    return shared


def _short(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
