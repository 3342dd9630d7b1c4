"""A preference record: the form every source yields and every file is checked against."""

from dataclasses import dataclass

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
