"""The check that a checkpoint is whole and ours, and the newest one that is.

A manifest proves integrity, not origin. Whoever may write to a directory may write a manifest, too: hence the look at
owners, and shards are read by readers that run nothing.
"""

import contextlib
import logging
import os
import stat
import time
from pathlib import Path

from pal_ds.distributed import phase
from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.manifest import (
    MANIFEST,
    FormatError,
    Manifest,
    hash_file,
    read_manifest,
)
from pal_ds.engine.checkpoint.retention import restore_replaced
from pal_ds.engine.checkpoint.torch_archive import ForeignObjectError, load_archive
from pal_ds.errors import StorageError, UserError
from pal_ds.io.files import everything_under
from pal_ds.io.sealed import FileEntry, share_of
from pal_ds.runs.run_dir import RunDirectory

logger = logging.getLogger(__name__)

SECONDS_TO_APPEAR = 60
"""A network file system may show one node's files to another with this delay."""


class UntrustedCheckpointError(UserError):
    """A checkpoint that others may have written; not damaged, so no reason to fall back to an older one."""


NO_DAMAGE = (UntrustedCheckpointError, ForeignObjectError, FormatError, StorageError)
"""Errors that end a start rather than sending it to an older checkpoint."""


def verify_checkpoint(path: Path, *, trust: bool = False) -> Manifest:
    """Return the manifest of `path`, once every file was found to be named, whole, ours and free of foreign objects.

    `trust` accepts files that another user owns or anyone may write.

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
    files, there = manifest["files"], sorted(path.rglob("*"))
    if not trust:
        for inside in (path, *there):
            refuse_strangers(inside)
    for file in there:
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
    statuses = [path.lstat()]
    if stat.S_ISLNK(statuses[0].st_mode):
        # Who made the link is one question, who may write to what it leads to another.
        with contextlib.suppress(FileNotFoundError):
            statuses.append(path.stat())
    for status in statuses:
        if status.st_uid not in (os.getuid(), 0):
            problem = f"belongs to another user (uid {status.st_uid})"
        elif status.st_mode & stat.S_IWOTH and not stat.S_ISLNK(status.st_mode):
            problem = "may be written by anyone"
        else:
            continue
        raise UntrustedCheckpointError(
            f"{path}: {problem}, so a stranger may have put weights or code here. Pass --trust_checkpoint if you trust "
            "whoever wrote it; what is yours is closed by chmod -R o-w."
        )


def refuse_strangers_run(run: RunDirectory) -> None:
    """Raise UntrustedCheckpointError where a stranger may have written something of a run that its readers read.

    That is all but the files of its checkpoints, which `check_listing` looks at for the step that is read.
    """
    refuse_strangers(run.path)
    for path in sorted(run.path.iterdir()):
        whole = path.is_dir() and path.name not in (
            run.checkpoints.name,
            "slurm",
            "stacks",
            "wandb",
        )
        for inside in everything_under(path) if whole else (path,):
            # Another process may be writing: a file beside its final name is gone in a moment.
            with contextlib.suppress(FileNotFoundError):
                refuse_strangers(inside)


def newest_intact_for_all(
    run: RunDirectory, world: World, *, trust: bool = False
) -> tuple[Path, Manifest] | None:
    """Return the newest checkpoint that verifies, with its manifest, on every rank; None where there is none.

    Rank 0 chooses the step and looks at its listing; each rank reads its share of the files, as one alone would hash
    for longer than the others wait. Damage that any rank finds is logged and sends all to the step before. A step whose
    replacement was cut off has its name back first.

    Raises:
        StorageError: a rank cannot read a file, or does not see what rank 0 sees.
        UntrustedCheckpointError, ForeignObjectError: the newest that is whole may come from a stranger.
        FormatError: the newest that is whole is of another version of pal_ds.
        UserError: there are checkpoints and none is intact.
    """

    def choose() -> list[int]:
        restore_replaced(run)
        return run.all_steps()

    steps = world.from_rank_zero(choose)
    for step in reversed(steps):
        try:
            return run.checkpoint(step), _verify_together(run.checkpoint(step), world, trust=trust)
        except NO_DAMAGE:
            raise
        except UserError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
    if steps:
        raise UserError(
            f"{run.checkpoints}: none of the steps {steps} is intact. Start again with --fresh elsewhere."
        )
    return None


def _verify_together(path: Path, world: World, *, trust: bool) -> Manifest:
    phase.enter("verify a checkpoint")
    manifest = world.from_rank_zero(lambda: check_listing(path, trust=trust))
    mine = share_of(manifest["files"], world.rank, world.world_size)

    def first_problem() -> tuple[int, UserError] | None:
        wait_for_files(path, dict(mine.values()))
        for place, (name, entry) in mine.items():
            try:
                check_content(path / name, entry)
            except UserError as error:
                return place, error
        return None

    own_problem = world.on_every_rank(first_problem)
    problems = [problem for problem in world.gather(own_problem) if problem is not None]
    if problems:
        # The one that a process alone would have come to first.
        raise min(problems, key=lambda problem: problem[0])[1]
    return manifest


def wait_for_files(directory: Path, entries: dict[str, FileEntry]) -> None:
    """Wait until this node sees files that another rank wrote or has seen.

    Raises:
        StorageError: it never does, as where every node has a disk of its own under this name.
    """
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    for name, entry in entries.items():
        path = directory / name
        while not (path.is_file() and path.stat().st_size == entry["size"]):
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{path}: another rank has it, and this one does not see it whole. --run_dir must lie on a file "
                    "system that all nodes share."
                )
            phase.progress()  # this wait has its own end
            time.sleep(0.1)
