"""Prepared data: the memory-mapped prompts, responses, comparisons and users of a folder."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa

from pal_ds.data.dataset_info import DatasetInfo, TokensInfo
from pal_ds.data.ragged import Ragged
from pal_ds.data.splits import SPLITS
from pal_ds.data.verification import INFO_NAME, MEND, REMEDY, check_listing, check_tables
from pal_ds.errors import UserError
from pal_ds.io.arrow import values_of
from pal_ds.io.boundary import check_form, reading
from pal_ds.io.files import at_home
from pal_ds.io.sealed import is_intact
from pal_ds.users.ids import UserIds

FORMAT_VERSION = 3
"""3 added sizes and hashes of all files, and dataset.json's own checksum. 2 is still read."""
_LATER_KEYS = ("source", "licence", "user_marker_ids")
"""What data of the first versions may lack."""
_TOKEN_KEYS = (*_LATER_KEYS, *TokensInfo.__required_keys__)
"""What data of vectors may lack."""
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
"""label -1: a is preferred, +1: b, 0: neither (a tie); group -1: none; controversial 1: users disagree on the pair, 0:
they agree, -1: unknown; probability: that b is preferred, or NaN."""

SOFT_COMPARISON_DTYPE = np.dtype([*COMPARISON_DTYPE.descr, ("soft", np.int8)])
"""Of data with soft labels. soft 1: `probability` is itself the annotation, and label the likelier choice."""


def targets(table: np.ndarray) -> np.ndarray:
    """Return the share of the preference that b has, as annotated: 0, 1, 1/2 for a tie, or a soft label; fp32 [n]."""
    shares = (table["label"].astype(np.float32) + 1) / 2
    if "soft" not in (table.dtype.names or ()):
        return shares
    return np.where(table["soft"] == 1, table["probability"], shares).astype(np.float32)


def preferences(table: np.ndarray) -> np.ndarray:
    """Return which response each comparison prefers: -1 a, +1 b, 0 neither (a tie, a soft label of one half); int8 [n].

    >>> table = np.zeros(3, SOFT_COMPARISON_DTYPE)
    >>> table["label"], table["soft"], table["probability"] = 1, (0, 1, 1), (0.5, 0.5, 0.6)
    >>> preferences(table).tolist()
    [1, 0, 1]
    """
    if "soft" not in (table.dtype.names or ()):
        return table["label"]
    return np.where((table["soft"] == 1) & (table["probability"] == 0.5), 0, table["label"])


def best_accuracy(table: np.ndarray) -> float | None:
    """Return the best possible accuracy on comparisons whose label was drawn by a known probability.

    None unless all of those that prefer one response are such: a soft label says the likelier response itself.
    """
    table = table[preferences(table) != 0]
    chances = table["probability"].astype(np.float64)
    is_soft = "soft" in (table.dtype.names or ()) and bool(table["soft"].any())
    if is_soft or not len(table) or np.isnan(chances).any():
        return None
    return float(np.maximum(chances, 1 - chances).mean())


USERS_SCHEMA = pa.schema(
    [("id", pa.string()), ("row", pa.int64()), ("seen", pa.bool_()), ("group", pa.string())]
)
"""Columns of users.arrow."""


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
        """Memory-map the tables, their sizes, headers and ranges checked; `verify_content` reads every byte.

        Raises:
            UserError: a file is missing, damaged or of another version; the message names it.
        """
        path = at_home(path)
        info = read_info(path)
        with reading(path, "prepared data", MEND):
            return cls._opened(path, info)

    @classmethod
    def _opened(cls, path: Path, info: DatasetInfo) -> "PreparedData":
        if "files" in info:
            check_listing(path, info["files"])
        users = _read_users(path)
        tables = {name: _map(path, name) for name in _names_of_tables(path, info)}
        dtypes = (COMPARISON_DTYPE, SOFT_COMPARISON_DTYPE)
        if tables["comparisons"].dtype not in dtypes or tables["comparisons"].ndim != 1:
            raise UserError(f"{path / 'comparisons.npy'}: is no table of comparisons; {REMEDY}.")
        check_tables(path, info, tables, len(users))
        rows = {
            f"{name}s": Ragged(tables[f"{name}_tokens"], tables[f"{name}_offsets"])
            for name in ("prompt", "response")
            if f"{name}_tokens" in tables
        }
        return cls(
            path=path,
            info=info,
            comparisons=tables["comparisons"],
            response_prompt=tables["response_prompt"],
            users=UserIds.from_arrow(users.column("id")),
            user_seen=values_of(users.column("seen")),
            user_group=users.column("group").to_pylist(),
            prompts=rows.get("prompts"),
            responses=rows.get("responses"),
            response_num_chars=tables.get("response_num_chars"),
            prompt_vectors=tables.get("prompt_vectors"),
            response_vectors=tables.get("response_vectors"),
        )

    @property
    def hash(self) -> str:
        """xxh3_128 over all table files."""
        return self.info["hash"]

    @property
    def num_ties(self) -> int:
        """Comparisons in which neither response is preferred."""
        return self.info["counts"].get("ties", 0)

    @property
    def is_hard(self) -> bool:
        """True where every comparison prefers one response, with a probability of 1."""
        return self.num_ties == 0 and "soft" not in (self.comparisons.dtype.names or ())

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
    with reading(file, "list of prepared data", MEND):
        content = file.read_bytes()
        info = json.loads(content)
    version = info.get("format_version") if isinstance(info, dict) else None
    if version not in (2, FORMAT_VERSION):
        raise UserError(
            f"{file}: format_version is {version!r}, this program reads {FORMAT_VERSION}; delete "
            f"{path} and run `prepare` again"
        )
    with reading(file, "list of prepared data", MEND):
        is_sealed = version == FORMAT_VERSION or info.keys() & {"checksum", "files"}
        if is_sealed and not is_intact(content):
            raise UserError(f"{file}: does not match its own checksum; {REMEDY}.")
        is_text = info.get("kind") == "tokens"
        # Null in data of the other kind.
        other = {"tokens": {}, "vector_size": 0} | info
        other["vector_size" if is_text else "tokens"] = 0 if is_text else {}
        check_form(other, DatasetInfo, optional=_LATER_KEYS if is_text else _TOKEN_KEYS)
        if is_sealed and "files" not in info:
            raise ValueError("it lists no files")
    return cast(DatasetInfo, info)


def _names_of_tables(path: Path, info: DatasetInfo) -> list[str]:
    """Stems of the .npy files of the kind of data."""
    names = ["comparisons", "response_prompt"]
    if info["kind"] == "tokens":
        return [
            *names,
            *("prompt_tokens", "prompt_offsets", "response_tokens", "response_offsets"),
            "response_num_chars",
        ]
    has_prompts = "prompt_vectors.npy" in info.get("files", {}) or (
        "files" not in info and (path / "prompt_vectors.npy").exists()
    )
    return [*names, "response_vectors", *(["prompt_vectors"] if has_prompts else [])]


def _map(path: Path, name: str) -> np.ndarray:
    file = path / f"{name}.npy"
    with reading(file, "table of prepared data", MEND):
        return np.load(file, mmap_mode="r")


def _read_users(path: Path) -> pa.Table:
    file = path / "users.arrow"
    with reading(file, "table of users", MEND):
        with pa.memory_map(str(file.absolute())) as source, pa.ipc.open_file(source) as reader:
            table = reader.read_all()
        table.validate(full=True)
        if table.schema != USERS_SCHEMA:
            raise pa.ArrowInvalid(f"its columns are {', '.join(table.schema.names)}")
        return table
