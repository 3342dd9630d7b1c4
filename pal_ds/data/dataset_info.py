"""The keys of dataset.json, what a folder of prepared data says of itself."""

from typing import Any, Literal, NotRequired, TypedDict

from pal_ds.io.sealed import FileEntry


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
    end_variants: NotRequired[list[list[int]]]
    """All that may stand for the end in a text. Absent: the end alone, and behind the template's own end of a turn."""
    marker_ids: list[int] | None
    """Tokens in front of every response; None where they are not always the same."""
    user_marker_ids: list[int] | None
    """Tokens in front of every message of the user; None as above."""
    separator: str | None
    """None where a chat template is used."""
    chat_template: bool
    finished_header: NotRequired[bool]
    """True where the assistant's header was read from a finished conversation; absent: from the generation prompt."""
    call_arguments: NotRequired[Literal["object", "text"]]
    """Form in which the chat template takes the arguments of tool calls; absent: as each record has them."""
    clock: NotRequired[str | None]
    """What the chat template takes for now, in ISO 8601; absent where it asks for no date."""
    special_tokens: bool
    pad_token_id: int
    marker_kept: NotRequired[float | None]
    """Share of the texts with a prompt whose response marker is whole; null where none has a prompt."""


class SoftCounts(TypedDict):
    """Numbers of comparisons that do not prefer one response for sure."""

    ties: NotRequired[int]
    """Comparisons in which neither response is preferred; absent: 0."""
    soft_labels: NotRequired[int]
    """Comparisons whose label is a probability; absent: 0."""


class Counts(SoftCounts):
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

    checksum: NotRequired[str]
    """xxh3, 128 bits, of this file with zeros in its place; absent from format 2, as `files` is."""
    format_version: int
    files: NotRequired[dict[str, FileEntry]]
    """Size and hash of every other file, the tokenizer's too, by its path from the folder."""
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
    not_shown: NotRequired[dict[str, int]]
    """Number of distinct texts in which the chat template leaves something out, by its kind."""
    truncated_prompts: NotRequired[int]
    vector_size: int
    """Numbers of a vector; null where `kind` is "tokens"."""
    bayes_accuracy: NotRequired[dict[str, float]]
    """Best possible accuracy by split, where choice probabilities are known."""
