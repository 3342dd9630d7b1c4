"""Checkpoints that cannot lie: written aside, hashed, fsynced, renamed, then pointed at; verified before use.

Frozen base weights are never in a step: the run names where they lie. Nothing random needs saving, because order,
noise and dropout are functions of (seed, update); see `data/plan.py` and `engine/step.py`.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as torch_dist
import xxhash

from pal_ds.engine.dist import World
from pal_ds.errors import UserError
from pal_ds.run_dir import RunDirectory, write_json
from pal_ds.users import UserTable

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
ENGINE_TAG = "engine"


class UntrustedCheckpointError(UserError):
    """A checkpoint of another owner; not damaged, so no reason to fall back to an older one."""


def save_checkpoint(
    engine: Any, users: UserTable, run: RunDirectory, step: int, world: World, facts: dict[str, Any]
) -> Path:
    """Writes `step_N/` with engine shards, user rows and a manifest, and publishes it in latest.json."""
    final = run.checkpoint(step)
    temporary = final.with_name(final.name + ".tmp")

    def start() -> None:
        for stale in (temporary, final):
            # A directory of this step without a manifest is what an interrupted save left; never retry into it.
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir(parents=True)

    world.from_rank_zero(start)
    engine.save_checkpoint(
        str(temporary), tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=True
    )

    def add_users() -> None:
        users.save(temporary)
        # DeepSpeed drops its recovery scripts beside the tag; tools/consolidate.py is ours.
        for script in temporary.glob("zero_to_*.py"):
            script.unlink()

    world.barrier()
    world.from_rank_zero(add_users)
    files = _hash_files(temporary, world)
    world.from_rank_zero(
        lambda: _publish(run, step, temporary, final, {**facts, "files": files}, world)
    )
    return final


def _publish(
    run: RunDirectory,
    step: int,
    temporary: Path,
    final: Path,
    manifest: dict[str, Any],
    world: World,
) -> None:
    facts = {"format_version": FORMAT_VERSION, "step": step, "world_size": world.world_size}
    write_json(
        temporary / "manifest.json", {**facts, "num_threads": torch.get_num_threads(), **manifest}
    )
    for folder in (temporary / ENGINE_TAG, temporary):
        _fsync_directory(folder)
    os.replace(temporary, final)
    _fsync_directory(final.parent)
    write_json(run.path / "latest.json", {"step": step, "path": str(final.relative_to(run.path))})


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _hash_files(directory: Path, world: World) -> dict[str, dict[str, Any]]:
    """Size and hash of every file; ranks share the reading."""
    names = sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()
    )
    mine = {}
    for name in names[world.rank :: world.world_size]:
        with open(directory / name, "rb") as stream:
            os.fsync(stream.fileno())
        mine[name] = {
            "size": (directory / name).stat().st_size,
            "xxh3_128": hash_file(directory / name),
        }
    parts: list[Any] = [None] * world.world_size
    if world.world_size > 1:
        torch_dist.all_gather_object(parts, mine)
    else:
        parts = [mine]
    return dict(sorted((name, entry) for part in parts for name, entry in part.items()))


def hash_file(path: Path) -> str:
    """xxh3, 128 bits, in hexadecimal: fast enough for shards of many gigabytes."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def verify_checkpoint(path: Path, *, trust: bool = False) -> dict[str, Any]:
    """The manifest of `path` after checking owner, version, and size and hash of every file it names.

    Raises:
        UserError: what is wrong with which file. Engine shards are pickles, which run code when they are read:
            hence no reading before this check, and no directory of another owner without `trust`.
    """
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path}: no manifest.json, so this is no complete checkpoint of pal_ds.")
    if path.stat().st_uid != os.getuid() and not trust:
        raise UntrustedCheckpointError(
            f"{path}: belongs to another user, and engine shards are pickles that run code when read. "
            "Pass --trust_checkpoint if you trust whoever wrote it."
        )
    manifest = read_manifest(path)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: named in the manifest but missing.")
        if file.stat().st_size != entry["size"]:
            raise UserError(
                f"{file}: {file.stat().st_size} bytes, the manifest says {entry['size']}."
            )
        if hash_file(file) != entry["xxh3_128"]:
            raise UserError(f"{file}: its content does not match the hash in the manifest.")
    return manifest


def read_manifest(path: Path) -> dict[str, Any]:
    """manifest.json of a checkpoint, nothing of which is verified but its format; UserError where it is unreadable."""
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON ({error}); the checkpoint is damaged.") from None
    found = manifest.get("format_version") if isinstance(manifest, dict) else None
    if found != FORMAT_VERSION:
        raise UserError(f"{file}: format {found}, this version reads {FORMAT_VERSION}.")
    return manifest


def newest_intact(run: RunDirectory, *, trust: bool = False) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that verifies, with its manifest; damaged ones are named and skipped.

    Raises:
        UserError: there are checkpoints and none is intact.
    """
    steps = run.complete_steps()
    for step in reversed(steps):
        try:
            return run.checkpoint(step), verify_checkpoint(run.checkpoint(step), trust=trust)
        except UntrustedCheckpointError:
            raise
        except UserError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
    if steps:
        raise UserError(
            f"{run.checkpoints}: none of the steps {steps} is intact. Start again with --fresh elsewhere."
        )
    return None


def refuse_other_launch(
    path: Path, manifest: dict[str, Any], dataset_hash: str, data_path: Path, world_size: int
) -> None:
    """Raises UserError where a checkpoint was made from other data or by another number of ranks than this launch."""
    if manifest["dataset_hash"] != dataset_hash:
        raise UserError(
            f"{path}: trained on data with hash {manifest['dataset_hash']}, {data_path} has {dataset_hash}. "
            "Resume with the data it was trained on, or start in another --run_dir."
        )
    if manifest["world_size"] != world_size:
        raise UserError(
            f"{path}: written by {manifest['world_size']} ranks, this run has {world_size}. "
            f"Launch with {manifest['world_size']} ranks."
        )


def refuse_other_base(path: Path, manifest: dict[str, Any], base_weights: str | None) -> None:
    """Raises UserError where the frozen weights that a checkpoint stands on are not those at hand."""
    if manifest.get("base_weights") != base_weights:
        raise UserError(
            f"{path}: trained on frozen weights {manifest.get('base_weights')}, backbone.path now holds "
            f"{base_weights}. Bring back the weights it was trained on."
        )


def load_checkpoint(
    engine: Any, users: UserTable, path: Path, manifest: dict[str, Any], world: World
) -> None:
    """Restores weights, optimizer moments and user rows into a freshly built engine."""
    if manifest["num_threads"] != torch.get_num_threads():
        logger.warning(
            "resuming with %d threads per rank, the checkpoint had %d: results may differ in the last bits",
            torch.get_num_threads(),
            manifest["num_threads"],
        )
    stored = UserTable.load(path)
    if gone := sorted(set(users.ids) - set(stored.ids)):
        raise UserError(
            f"{path}: user {gone[0]!r} was removed from this run, and the data still hold their comparisons "
            f"({len(gone)} such users). Prepare the data without them and start in another --run_dir."
        )
    try:
        users.load_state_dict(stored.state_dict())
        loaded, _ = engine.load_checkpoint(str(path), tag=ENGINE_TAG, load_module_strict=False)
    except (RuntimeError, UserError) as error:
        raise UserError(
            f"{path}: does not fit the model of this recipe ({' '.join(str(error).split())[:300]}). "
            "A key that changes sizes cannot change on resume: restore it, or start in another --run_dir."
        ) from None
    # DeepSpeed answers None, with a warning, where it finds nothing: that must not become a fresh start.
    assert loaded is not None, f"DeepSpeed loaded nothing from {path}"


def retain(run: RunDirectory, num_keep: int, best_step: int | None) -> None:
    """Deletes all but the newest `num_keep` complete checkpoints and the best, and what interrupted saves left."""
    keep = set(run.complete_steps()[-num_keep:]) | {best_step}
    for path in run.checkpoints.glob("step_*"):
        name = path.name.removeprefix("step_")
        if not name.isdigit() or int(name) not in keep:
            shutil.rmtree(path)
