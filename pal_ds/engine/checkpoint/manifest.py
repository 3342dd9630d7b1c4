"""The manifest of a checkpoint: what it holds, every file with its size and hash, and the manifest's own checksum."""

import json
import logging
import re
from pathlib import Path, PurePosixPath
from typing import TypedDict

from pal_ds.distributed import phase
from pal_ds.engine.guard import GuardState
from pal_ds.errors import UserError
from pal_ds.io.boundary import check_form, reading
from pal_ds.io.files import sync_to_disk, write_atomically
from pal_ds.io.sealed import FileEntry, hash_of, is_intact, seal
from pal_ds.runs.run_dir import BestEvaluation, OriginFacts
from pal_ds.users import RowPriorState

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""2 added the manifest's own checksum."""
MANIFEST = "manifest.json"
_REMEDY = "The checkpoint is damaged: take another of the run (--step)."


class TrainingFacts(TypedDict):
    """The state of a training when it saves: enough, with shards and users, to go on from this step."""

    dataset_hash: str
    num_updates: int
    best: BestEvaluation | None
    base_weights: str | None
    """Fingerprint of the frozen weights that no checkpoint holds; None where all weights are trained."""
    init_from: OriginFacts | None
    guard: GuardState
    users_prior: RowPriorState | None
    """The prior of the table's rows; None where the recipe has none."""
    owes_evaluation: bool
    save_seconds: float | None
    """Longest time that a save has taken; None before the first."""
    unlogged: list[float]
    """The sums of `training.metrics_logger.Unlogged`."""


class ManifestContent(TrainingFacts):
    """manifest.json without what `write_manifest` adds."""

    step: int
    world_size: int
    num_threads: int
    files: dict[str, FileEntry]
    """Entry of every other file of the directory, by its path there."""


class Manifest(ManifestContent):
    """manifest.json."""

    checksum: str
    """xxh3, 128 bits, of the file itself with zeros in this place."""
    format_version: int


_MAY_LACK = {*TrainingFacts.__required_keys__, "temperature"} - {"dataset_hash"}
"""What manifests of the first versions do not have."""


class FormatError(UserError):
    """A checkpoint of another version of pal_ds; not damaged, so falling back to an older one would lose it."""


def hash_file(path: Path) -> str:
    """Return the xxh3 hash of a file, 128 bits in hexadecimal: fast enough for shards of many gigabytes."""
    return hash_of(path, phase.progress)


def entry_of(path: Path) -> FileEntry:
    """Return size and hash of a file, as the manifest holds them; the file is on the disk itself then."""
    sync_to_disk(path)
    return {"size": path.stat().st_size, "xxh3_128": hash_file(path)}


def write_manifest(directory: Path, manifest: ManifestContent) -> None:
    """Write manifest.json of `directory`, with its own checksum. Raises StorageError where it cannot be written."""
    # One that is written again has both of these already.
    rest = {k: v for k, v in manifest.items() if k not in ("checksum", "format_version")}
    content = {"format_version": FORMAT_VERSION, **rest}
    write_atomically(directory / MANIFEST, seal(content, indent=2))


def read_manifest(path: Path) -> Manifest:
    """Read manifest.json of a checkpoint, unharmed and of a known format; the files that it names are not looked at.

    Raises:
        FormatError: another version of pal_ds wrote it.
        UserError: it is missing, damaged, or names files outside the checkpoint.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{path}: no {MANIFEST}, so this is no complete checkpoint of pal_ds. Checkpoints that another program "
            "wrote cannot be used, trusted or not; delete the directory if it is the rest of a copy."
        )
    with reading(file, "manifest of a checkpoint", _REMEDY):
        content = file.read_bytes()
        manifest: Manifest = json.loads(content)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int:
        raise UserError(f"{file}: names no format version; the checkpoint is damaged.")
    if version != FORMAT_VERSION:
        # Unless it is ours but for that very number.
        theirs, ours = (f'"format_version": {v}'.encode() for v in (version, FORMAT_VERSION))
        if not is_intact(content.replace(theirs, ours, 1)):
            newer = version > FORMAT_VERSION
            raise FormatError(
                f"{file}: of format {version}, written by {'a newer' if newer else 'an older'} version of pal_ds; this "
                f"one reads format {FORMAT_VERSION}. {'Update pal_ds' if newer else 'Go on with that version'}, or "
                "start in another --run_dir; nothing was changed here."
            )
    if version != FORMAT_VERSION or not is_intact(content):
        raise UserError(f"{file}: does not match its own checksum; the checkpoint is damaged.")
    with reading(file, "manifest of a checkpoint", _REMEDY):
        check_form(manifest, Manifest, optional=_MAY_LACK)
        _check_fields(file, manifest)
    return manifest


def _check_fields(file: Path, manifest: Manifest) -> None:
    number = re.search(r"step_(\d+)$", file.parent.name)
    if number is not None and int(number[1]) != manifest["step"]:
        raise UserError(
            f"{file}: of step {manifest['step']}, in a directory of step {int(number[1])}. Give it its name back."
        )
    for name in manifest["files"]:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\0" in name:
            raise UserError(f"{file}: names {name!r}, which lies outside the checkpoint.")
