"""dataset.json, key by key: what was prepared, from what, and how texts became token ids."""

from typing import Any, Literal, NotRequired, TypedDict


class TokensInfo(TypedDict):
    """The `tokens` entry, written by `TextEncoder.describe` and read by `TextEncoder.from_info`."""

    tokenizer: str
    """Folder or hub id, or "trained"."""
    vocab_size: int
    max_length: int
    """Tokens of prompt + response at most."""
    truncation_side: NotRequired[Literal["left", "right"]]
    """Absent means left."""
    prefix_ids: list[int]
    end_ids: list[int]
    marker_ids: list[int] | None
    """Tokens in front of every response; None where they are not always the same."""
    user_marker_ids: list[int] | None
    """Tokens in front of every message of the user; None as above."""
    separator: str | None
    """None where a chat template is used."""
    chat_template: bool
    special_tokens: bool
    pad_token_id: int
    marker_kept: NotRequired[float | None]
    """Share of the texts with a prompt whose response marker is whole; null where none has a prompt."""


class Counts(TypedDict):
    """Sizes of the tables."""

    comparisons: int
    prompts: int
    responses: int
    users: int
    seen_users: int
    unseen_users: int
    splits: dict[str, int]
    """Number of comparisons by split."""


class DatasetInfo(TypedDict):
    """The whole of dataset.json."""

    format_version: int
    kind: Literal["tokens", "vectors"]
    hash: str
    """xxh3_128 over all table files."""
    source: dict[str, Any] | None
    """`Source.describe`; each source has keys of its own."""
    licence: str | None
    settings: NotRequired[dict[str, Any]]
    """The recipe's `data` section and the raw files' hashes; absent from tables of an ad-hoc file."""
    fingerprint: NotRequired[str]
    """Hash of `settings`."""
    counts: Counts
    dropped: dict[str, int]
    """Number of dropped comparisons by reason."""
    groups: list[str]
    tokens: TokensInfo
    """Null where `kind` is "vectors": a reader looks at `kind` first."""
    truncated_prompts: NotRequired[int]
    vector_size: int
    """Numbers of a vector; null where `kind` is "tokens"."""
    bayes_accuracy: NotRequired[dict[str, float]]
    """Best possible accuracy by split, where choice probabilities are known."""
