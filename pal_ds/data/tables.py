"""Prepared data: dataset.json key by key, and the memory-mapped prompts, responses, comparisons and users."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict, cast

import numpy as np
import pyarrow as pa

from pal_ds.data.ragged import Ragged
from pal_ds.data.splits import SPLITS
from pal_ds.errors import UserError
from pal_ds.io.arrow import values_of
from pal_ds.users.ids import UserIds


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


FORMAT_VERSION = 2
INFO_NAME = "dataset.json"
COMPARISON_DTYPE = np.dtype(
    [
        ("user", np.int64),
        ("a", np.int64),
        ("b", np.int64),
        ("label", np.int8),
        ("margin", np.float32),
        ("group", np.int32),
        ("split", np.int8),
        ("controversial", np.int8),
        ("probability", np.float32),
    ]
)
"""label -1: a is preferred, +1: b; group -1: none; controversial 1: users disagree on the pair, 0:
they agree, -1: unknown; probability: that b is preferred, or NaN."""


@dataclass(frozen=True)
class PreparedData:
    """The tables of one `DATA/` directory. Token data has no vectors, vector data no tokens."""

    path: Path
    info: DatasetInfo
    comparisons: np.ndarray
    response_prompt: np.ndarray
    users: UserIds | list[str]
    user_seen: np.ndarray
    user_group: list[str | None]
    prompts: Ragged | None = None
    responses: Ragged | None = None
    response_num_chars: np.ndarray | None = None
    prompt_vectors: np.ndarray | None = None
    response_vectors: np.ndarray | None = None

    @classmethod
    def open(cls, path: str | Path) -> "PreparedData":
        """Memory-map the tables; a UserError names a file that is missing or of another version."""
        path = Path(path)
        info = read_info(path)
        users = _read_users(path)
        common = {
            "path": path,
            "info": info,
            "comparisons": _map(path, "comparisons"),
            "response_prompt": _map(path, "response_prompt"),
            "users": UserIds.from_arrow(users.column("id")),
            "user_seen": values_of(users.column("seen")),
            "user_group": users.column("group").to_pylist(),
        }
        if info["kind"] == "vectors":
            has_prompts = (path / "prompt_vectors.npy").exists()
            return cls(
                **common,
                response_vectors=_map(path, "response_vectors"),
                prompt_vectors=_map(path, "prompt_vectors") if has_prompts else None,
            )
        return cls(
            **common,
            prompts=Ragged(_map(path, "prompt_tokens"), _map(path, "prompt_offsets")),
            responses=Ragged(_map(path, "response_tokens"), _map(path, "response_offsets")),
            response_num_chars=_map(path, "response_num_chars"),
        )

    @property
    def hash(self) -> str:
        """xxh3_128 over all table files."""
        return self.info["hash"]

    @property
    def groups(self) -> list[str]:
        """Names of the codes in `comparisons["group"]`."""
        return self.info["groups"]

    @property
    def tokenizer_path(self) -> Path:
        """Folder that AutoTokenizer opens."""
        return self.path / "tokenizer"

    @cached_property
    def user_rows(self) -> dict[str, int]:
        """user id -> row."""
        return {user: row for row, user in enumerate(self.users)}

    def rows(self, split: str) -> np.ndarray:
        """Indices of the comparisons in a split, in table order."""
        if split not in SPLITS:
            raise UserError(f"no split is called '{split}'; the splits are {', '.join(SPLITS)}")
        return np.flatnonzero(self.comparisons["split"] == SPLITS.index(split))

    def prompt_hashes(self) -> np.ndarray:
        """uint64 per prompt from its tokens (or vector): equal prompts of two datasets match."""
        import xxhash

        table = self.prompts if self.prompts is not None else self.prompt_vectors
        if table is None:
            return np.zeros(0, np.uint64)
        rows = (np.ascontiguousarray(table[row]).data for row in range(len(table)))
        return np.fromiter((xxhash.xxh3_64_intdigest(row) for row in rows), np.uint64, len(table))


def group_codes(own: PreparedData, data: PreparedData) -> np.ndarray:
    """The code that `own` has for each group of `data`, -1 for one that it does not know; int64."""
    codes = {name: code for code, name in enumerate(own.groups)}
    return np.asarray([codes.get(name, -1) for name in data.groups], np.int64)


def read_info(path: Path) -> DatasetInfo:
    """dataset.json, once its format version is one we read."""
    file = path / INFO_NAME
    if not file.exists():
        raise UserError(
            f"{file}: no such file, so {path} holds no prepared data; run `prepare` first or mend "
            "data.path"
        )
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); run `prepare` again") from None
    version = info.get("format_version") if isinstance(info, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: format_version is {version!r}, this program reads {FORMAT_VERSION}; delete "
            f"{path} and run `prepare` again"
        )
    return cast(DatasetInfo, info)


def _map(path: Path, name: str) -> np.ndarray:
    file = path / f"{name}.npy"
    try:
        return np.load(file, mmap_mode="r")
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such file, though {path / INFO_NAME} is there; the prepared data is "
            f"damaged. Delete {path} and run `prepare` again"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{file}: cannot be read ({error}); delete {path} and run `prepare` again"
        ) from None


def _read_users(path: Path) -> pa.Table:
    file = path / "users.arrow"
    if not file.exists():
        raise UserError(f"{file}: no such file; delete {path} and run `prepare` again")
    with pa.memory_map(str(file)) as source, pa.ipc.open_file(source) as reader:
        return reader.read_all()
