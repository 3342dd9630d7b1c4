"""A preference record, the form every source yields, and the chat messages that its texts may be."""

from dataclasses import dataclass

from pal_ds.errors import UserError

Text = str | list[dict[str, str]]
"""A plain string, or chat messages `[{"role": ..., "content": ...}, ...]`."""


@dataclass(frozen=True, slots=True)
class Record:
    """`user_id` compared two responses to `prompt`. Texts, or vectors in their place, never both.

    `label` is y of the field's triple: -1 when responses[0] is preferred, +1 when responses[1] is.
    """

    user_id: str
    label: int
    prompt: Text | None = None
    responses: tuple[Text, Text] | None = None
    prompt_features: tuple[float, ...] | None = None
    response_features: tuple[tuple[float, ...], tuple[float, ...]] | None = None
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


Message = dict[str, str]


def check_messages(messages: list, where: str, key: str) -> list[Message]:
    """`messages` reduced to role and content, or a UserError that names what is wrong with them."""
    if not messages:
        raise UserError(f"{where}: '{key}' is an empty list of messages; give at least one message")
    checked = []
    for position, message in enumerate(messages):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(field), str) for field in ("role", "content")
        ):
            raise UserError(
                f"{where}: '{key}' message {position} is {_short(message)}; a message is an object "
                'with text in "role" and "content"'
            )
        checked.append({"role": message["role"], "content": message["content"]})
    return checked


def as_messages(text: Text, role: str) -> list[Message]:
    """Chat messages as they are; a plain string as one message of `role`."""
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def render_plain(text: Text) -> str:
    """Messages as "role: content" paragraphs (for tokenizers without a chat template).

    A lone assistant message is its content: it stands where a plain response would.
    """
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0]["role"] == "assistant":
        return text[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in text)


def is_empty(text: Text) -> bool:
    """True when there is nothing to read: no text, or a last message without any."""
    return not (text if isinstance(text, str) else text[-1]["content"]).strip()


def num_shared_messages(first: list[Message], second: list[Message], where: str) -> int:
    """Number of leading messages two conversations share as an implicit prompt.

    Each keeps at least its last message. Raises UserError unless all that remains is the assistant's.
    """
    limit = min(len(first), len(second)) - 1
    shared = 0
    while shared < limit and first[shared] == second[shared]:
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
