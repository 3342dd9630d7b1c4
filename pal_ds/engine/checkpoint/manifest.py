"""The manifest of a checkpoint, and the check that it is true: every file, its size, its hash, its owner.

A manifest proves integrity, not origin. Whoever may write to a directory may write a manifest, too: hence the look at
owners, and shards are read by readers that run nothing.
"""

import json
import logging
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypedDict

import xxhash

from pal_ds.distributed import phase
from pal_ds.engine.checkpoint.retention import restore_replaced
from pal_ds.engine.checkpoint.shard_writer import FileEntry
from pal_ds.engine.checkpoint.torch_archive import ForeignObjectError, load_archive
from pal_ds.engine.guard import GuardState
from pal_ds.errors import StorageError, UserError
from pal_ds.io.files import write_atomically
from pal_ds.io.hashing import feed
from pal_ds.runs.run_dir import BestEvaluation, OriginFacts, RunDirectory

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
"""2 added the manifest's own checksum."""
MANIFEST = "manifest.json"
_FIELDS = {
    "step": int,
    "world_size": int,
    "num_threads": int,
    "dataset_hash": str,
    "files": dict,
}
_NO_CHECKSUM = "0" * 32
"""Bytes that are hashed at a time, of a size that a processor still holds when it hashes what it has just read."""


class TrainingFacts(TypedDict):
    """The state of a training when it saves: enough, with shards and users, to go on from this step."""

    dataset_hash: str
    num_updates: int
    best: BestEvaluation | None
    base_weights: str | None
    """Fingerprint of the frozen weights that no checkpoint holds; None where all weights are trained."""
    init_from: OriginFacts | None
    guard: GuardState
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


class UntrustedCheckpointError(UserError):
    """A checkpoint that others may have written; not damaged, so no reason to fall back to an older one."""


class FormatError(UserError):
    """A checkpoint of another version of pal_ds; not damaged, so falling back to an older one would lose it."""


NO_DAMAGE = (UntrustedCheckpointError, ForeignObjectError, FormatError, StorageError)
"""Errors that end a start rather than sending it to an older checkpoint."""


def hash_file(path: Path) -> str:
    """Return the xxh3 hash of a file, 128 bits in hexadecimal: fast enough for shards of many gigabytes."""
    return feed(xxhash.xxh3_128(), path, phase.progress).hexdigest()


def entry_of(path: Path) -> FileEntry:
    """Return size and hash of a file, as the manifest holds them; the file is on the disk itself then."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())
    return {"size": path.stat().st_size, "xxh3_128": hash_file(path)}


def write_manifest(directory: Path, manifest: ManifestContent) -> None:
    """Write manifest.json of `directory`, with its own checksum.

    Raises:
        StorageError: it cannot be written.
    """
    own = {"checksum": _NO_CHECKSUM, "format_version": FORMAT_VERSION}
    content = {**own, **manifest, **own}
    text = json.dumps(content, indent=2) + "\n"
    digest = xxhash.xxh3_128(text.encode()).hexdigest()
    write_atomically(directory / MANIFEST, text.replace(_NO_CHECKSUM, digest, 1))


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
    content = file.read_bytes()
    try:
        manifest: Manifest = json.loads(content)
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); the checkpoint is damaged.") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int:
        raise UserError(f"{file}: names no format version; the checkpoint is damaged.")
    if version != FORMAT_VERSION:
        # Unless it is ours but for that very number.
        theirs, ours = (f'"format_version": {v}'.encode() for v in (version, FORMAT_VERSION))
        if not _has_own_checksum(content.replace(theirs, ours, 1), manifest):
            raise FormatError(_other_format(file, version))
    if version != FORMAT_VERSION or not _has_own_checksum(content, manifest):
        raise UserError(f"{file}: does not match its own checksum; the checkpoint is damaged.")
    _check_fields(file, manifest)
    return manifest


def _has_own_checksum(content: bytes, manifest: Manifest) -> bool:
    checksum = str(manifest.get("checksum"))
    blank = content.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1)
    return checksum == xxhash.xxh3_128(blank).hexdigest()


def _other_format(file: Path, version: int) -> str:
    newer = version > FORMAT_VERSION
    return (
        f"{file}: of format {version}, written by {'a newer' if newer else 'an older'} version of pal_ds; this one "
        f"reads format {FORMAT_VERSION}. {'Update pal_ds' if newer else 'Go on with that version'}, or start in "
        "another --run_dir; nothing was changed here."
    )


def _check_fields(file: Path, manifest: Manifest) -> None:
    for name, kind in _FIELDS.items():
        if not isinstance(manifest.get(name), kind):
            raise UserError(
                f"{file}: {name} is {manifest.get(name)!r}, which is no {kind.__name__}."
            )
    number = re.search(r"step_(\d+)$", file.parent.name)
    if number is not None and int(number[1]) != manifest["step"]:
        raise UserError(
            f"{file}: of step {manifest['step']}, in a directory of step {int(number[1])}. Give it its name back."
        )
    for name, entry in manifest["files"].items():
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute() or "\0" in name:
            raise UserError(f"{file}: names {name!r}, which lies outside the checkpoint.")
        if not isinstance(entry, dict) or not {"size", "xxh3_128"} <= entry.keys():
            raise UserError(f"{file}: has no size and hash of {name}.")


def verify_checkpoint(path: Path, *, trust: bool = False) -> Manifest:
    """Return the manifest of `path`, once every file was found to be named, whole, ours and free of foreign objects.

    Args:
        path: a `step_N` directory.
        trust: accept files that another user owns or anyone may write.

    Raises:
        UntrustedCheckpointError: others may have written it, and `trust` is not given.
        FormatError: another version of pal_ds wrote it.
        ForeignObjectError: a shard names an object that reading it would run.
        UserError: what is wrong with which file.
    """
    manifest = check_listing(path, trust=trust)
    for name, entry in manifest["files"].items():
        check_content(path / name, entry)
    return manifest


def check_listing(path: Path, *, trust: bool = False) -> Manifest:
    """Do the cheap part of `verify_checkpoint`, which reads no file but the manifest; return and raise as it does."""
    manifest = read_manifest(path)
    files = manifest["files"]
    if not trust:
        for inside in (path, *sorted(path.rglob("*"))):
            refuse_strangers(inside)
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_symlink():
            raise UserError(
                f"{file}: is a link, whose target may change after this check. Put the files here."
            )
        # Hidden files are a file system's own; neither we nor DeepSpeed look at them.
        if file.is_dir() or name in files or name == MANIFEST or file.name.startswith("."):
            continue
        raise UserError(
            f"{file}: is not named in the manifest, and DeepSpeed might read it. Take it out of the checkpoint."
        )
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: named in the manifest but missing.")
        if file.stat().st_size != entry["size"]:
            raise UserError(
                f"{file}: {file.stat().st_size} bytes, the manifest says {entry['size']}."
            )
    return manifest


def check_content(file: Path, entry: FileEntry) -> None:
    """Do the expensive part of `verify_checkpoint` for one file: read all of it. Raises UserError as it does."""
    if hash_file(file) != entry["xxh3_128"]:
        raise UserError(f"{file}: its content does not match the hash in the manifest.")
    if file.suffix == ".pt":
        # Costs kilobytes: tensors stay where they are.
        load_archive(file)


def refuse_strangers(path: Path) -> None:
    """Raise UntrustedCheckpointError where someone else than this user and root may have written `path`."""
    status = path.lstat()
    if status.st_uid not in (os.getuid(), 0):
        problem = f"belongs to another user (uid {status.st_uid})"
    elif status.st_mode & stat.S_IWOTH and not stat.S_ISLNK(status.st_mode):
        problem = "may be written by anyone"
    else:
        return
    raise UntrustedCheckpointError(
        f"{path}: {problem}, so a stranger may have put weights or code here. Pass --trust_checkpoint if you trust "
        "whoever wrote it."
    )


def refuse_strangers_code(run: RunDirectory) -> None:
    """Raises UntrustedCheckpointError where a stranger may have written code that opening the run would execute."""
    folder = run.path / "code"
    if folder.is_dir():
        for path in (folder, *folder.rglob("*")):
            refuse_strangers(path)


def newest_intact(run: RunDirectory, *, trust: bool = False) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that verifies, with its manifest, or None; damaged ones are logged and skipped.

    A step whose replacement was cut off has its name back first.

    Raises:
        UntrustedCheckpointError, ForeignObjectError: the newest that is whole may come from a stranger.
        FormatError: the newest that is whole is of another version of pal_ds.
        UserError: there are checkpoints and none is intact.
    """
    restore_replaced(run)
    return first_intact(run, run.all_steps(), lambda path: verify_checkpoint(path, trust=trust))


def first_intact(
    run: RunDirectory, steps: list[int], verify: Callable[[Path], Manifest]
) -> tuple[Path, Manifest] | None:
    """Return the last of `steps` that `verify` finds no damage in, or None; raises as `newest_intact` does."""
    for step in reversed(steps):
        try:
            return run.checkpoint(step), verify(run.checkpoint(step))
        except NO_DAMAGE:
            raise
        except UserError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
    if steps:
        raise UserError(
            f"{run.checkpoints}: none of the steps {steps} is intact. Start again with --fresh elsewhere."
        )
    return None
