"""Checks of prepared data: whether the tables are what `prepare` wrote, and whether their values can be read at all.

Opening the data costs a look at sizes, headers and ranges; a training, an evaluation and whatever else computes from
them read every byte once against the hashes in dataset.json.
"""

import itertools
import logging
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash

from pal_ds.data.splits import SPLITS
from pal_ds.distributed import phase
from pal_ds.errors import UserError
from pal_ds.io.files import everything_under, feed
from pal_ds.io.sealed import FileEntry, hash_of, share_of

if TYPE_CHECKING:  # it brings torch, which opening data does not need
    from pal_ds.distributed.world import World

logger = logging.getLogger(__name__)

INFO_NAME = "dataset.json"
MEND = "Delete the folder and run `prepare` again."
REMEDY = "the prepared data is damaged or was changed. Delete the folder and run `prepare` again"


def hash_tables(folder: Path) -> str:
    """Return xxh3_128 over the names and bytes of all table files: what names these data for good."""
    digest = xxhash.xxh3_128()
    for path in sorted([*folder.glob("*.npy"), folder / "users.arrow"]):
        digest.update(path.name.encode())
        feed(digest, path, phase.progress)
    return digest.hexdigest()


def check_listing(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Hold names and sizes of the files that are read against those that dataset.json lists.

    Raises:
        UserError: one is missing or has another size, or a table or a file of the tokenizer was added: whatever lies
            beside its files may change what a tokenizer does.
    """
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: missing, though {INFO_NAME} names it; {REMEDY}.")
        if (size := file.stat().st_size) != entry["size"]:
            raise UserError(f"{file}: {size} bytes, {INFO_NAME} says {entry['size']}; {REMEDY}.")
    folders = {parent.as_posix() for name in files for parent in PurePosixPath(name).parents}
    tokenizer = folder / "tokenizer"
    there = everything_under(tokenizer) if tokenizer.exists() else ()
    for path in (*there, *sorted(folder.glob("*.npy"))):
        name = path.relative_to(folder).as_posix()
        is_folder = name in folders and (path == tokenizer or not path.is_symlink())
        if name not in files and not is_folder:
            raise UserError(
                f"{path}: is not among the files that {INFO_NAME} lists, and only what `prepare` wrote is read. Take "
                "it out of the folder."
            )


def verify_tokenizer(folder: Path, info: Mapping[str, Any]) -> None:
    """Read the tokenizer's files against their hashes: all of the data that scoring a text reads.

    Raises:
        UserError: one of them is not what `prepare` wrote.
    """
    for name, entry in info.get("files", {}).items():
        if name.startswith("tokenizer/"):
            _check_hash(folder / name, entry)


def verify_content(folder: Path, info: Mapping[str, Any], world: "World") -> None:
    """Read every file of prepared data once against its hash; ranks that see the same folder share the files out.

    `info` is dataset.json. Data of before it named its files are held against the one hash over all tables.

    Raises:
        UserError: on every rank, where a file on any of them is not the one that `prepare` wrote.
    """
    phase.enter("verify the prepared data")
    file = (folder / INFO_NAME).stat()
    # Every node may have a copy of its own: its ranks answer for that one.
    place = (socket.gethostname(), file.st_dev, file.st_ino, file.st_mtime_ns)
    same = [rank for rank, other in enumerate(world.gather(place)) if other == place]
    world.on_every_rank(lambda: _verify_share(folder, info, same.index(world.rank), len(same)))


def _verify_share(folder: Path, info: Mapping[str, Any], rank: int, world_size: int) -> None:
    files = info.get("files")
    if files is None:
        if rank == 0:
            logger.warning(
                "%s: prepared by an older version, which kept no hash of each file; the tables are checked as a whole, "
                "the tokenizer is not",
                folder,
            )
            if hash_tables(folder) != info["hash"]:
                raise UserError(f"{folder}: the tables do not match their hash; {REMEDY}.")
        return
    for name, entry in share_of(files, rank, world_size).values():
        _check_hash(folder / name, entry)


def _check_hash(file: Path, entry: FileEntry) -> None:
    if hash_of(file, phase.progress) != entry["xxh3_128"]:
        raise UserError(f"{file}: does not match its hash in {INFO_NAME}; {REMEDY}.")


def check_tables(
    folder: Path, info: Mapping[str, Any], tables: Mapping[str, np.ndarray], num_users: int
) -> None:
    """Check shapes, types and ranges of the tables, which are keyed by the stems of their files.

    Token ids are looked at only where no hash answers for them: that reads all of the data.

    Raises:
        UserError: for the first problem; the message names file and rule.
    """
    problems = itertools.chain(
        _row_problems(info, tables), _comparison_problems(info, tables, num_users)
    )
    for name, problem in problems:
        raise UserError(f"{folder / name}.npy: {problem}; {REMEDY}.")


def _row_problems(
    info: Mapping[str, Any], tables: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, str]]:
    """Yield (stem, what is wrong) of the rows of prompts and responses."""
    num_responses = len(tables["response_prompt"])
    for name in ("prompt", "response"):
        if f"{name}_tokens" in tables:
            yield from _ragged_problems(name, tables, info)
        vectors, size = tables.get(f"{name}_vectors"), info.get("vector_size")
        if vectors is not None and (vectors.dtype != np.float32 or vectors.shape[1:] != (size,)):
            yield f"{name}_vectors", f"holds no vectors of {size} numbers"
    for name, extra in (("offsets", 1), ("num_chars", 0), ("vectors", 0)):
        rows = tables.get(f"response_{name}")
        if rows is not None and len(rows) - extra != num_responses:
            yield f"response_{name}", f"has not the {num_responses} rows of response_prompt.npy"
    num_prompts = None
    if "prompt_offsets" in tables:
        num_prompts = len(tables["prompt_offsets"]) - 1
    elif "prompt_vectors" in tables:
        num_prompts = len(tables["prompt_vectors"])
    of_response = tables["response_prompt"]
    if of_response.ndim != 1 or of_response.dtype != np.int64:
        yield "response_prompt", "is no list of rows of prompts"
    elif not _within(of_response, 0, num_prompts):
        yield "response_prompt", "names prompts that there are not"


def _ragged_problems(
    name: str, tables: Mapping[str, np.ndarray], info: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    tokens, offsets = tables[f"{name}_tokens"], tables[f"{name}_offsets"]
    if tokens.dtype != np.int32 or tokens.ndim != 1:
        yield f"{name}_tokens", "is no list of token ids"
    elif offsets.dtype != np.int64 or offsets.ndim != 1 or not len(offsets):
        yield f"{name}_offsets", "is no list of offsets"
    elif offsets[0] != 0 or offsets[-1] != len(tokens) or (np.diff(offsets) < 0).any():
        yield f"{name}_offsets", f"does not cut {name}_tokens.npy into rows"
    elif "files" not in info and not _within(tokens, 0, info["tokens"]["vocab_size"]):
        yield f"{name}_tokens", "has token ids outside of the vocabulary"


def _comparison_problems(
    info: Mapping[str, Any], tables: Mapping[str, np.ndarray], num_users: int
) -> Iterator[tuple[str, str]]:
    table, num_responses = tables["comparisons"], len(tables["response_prompt"])
    limits = {
        "user": (0, num_users),
        "a": (0, num_responses),
        "b": (0, num_responses),
        "label": (-1, 2),
        "group": (-1, len(info["groups"])),
        "split": (0, len(SPLITS)),
        "controversial": (-1, 2),
    }
    for key, (low, high) in limits.items():
        if not _within(table[key], low, high):
            yield "comparisons", f"has a value of {key!r} outside of [{low}, {high - 1}]"
    num_ties = int((table["label"] == 0).sum())
    if num_ties != info["counts"].get("ties", 0):
        yield "comparisons", f"has {num_ties} labels 0 (ties), which is not what {INFO_NAME} says"
    if "soft" in (table.dtype.names or ()):
        is_soft = table["soft"] == 1
        if not _within(table["soft"], 0, 2) or np.isnan(table["probability"][is_soft]).any():
            yield "comparisons", "has a soft label without its probability"
    if not np.isfinite(table["margin"]).all():
        yield "comparisons", "has a margin that is no finite number"
    known = table["probability"][~np.isnan(table["probability"])]
    if ((known < 0) | (known > 1)).any():
        yield "comparisons", "has a probability outside of [0, 1]"
    if len(table) != info["counts"].get("comparisons"):
        yield "comparisons", f"has {len(table)} rows, which is not what {INFO_NAME} says"


def _within(values: np.ndarray, low: int, high: int | None) -> bool:
    """Return True where all values are in [low, high)."""
    if not len(values):
        return True
    return bool(values.min() >= low and (high is None or values.max() < high))
