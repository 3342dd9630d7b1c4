"""Checkpoints that cannot lie: written aside, hashed, fsynced, renamed, then pointed at; verified before use.

Frozen base weights are never in a step: the run names where they lie. Nothing random needs saving, because order,
noise and dropout are functions of (seed, update); see `data/plan.py` and `engine/step.py`.
"""

import logging
import os
import stat
from pathlib import Path

import torch

from pal_ds.distributed import phase
from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.manifest import (
    Manifest,
    ManifestContent,
    TrainingFacts,
    entry_of,
    write_manifest,
)
from pal_ds.engine.checkpoint.reshard import shards_for
from pal_ds.engine.checkpoint.retention import REPLACED, discard, discard_leftovers
from pal_ds.engine.checkpoint.shard_reader import ENGINE_FOLDER
from pal_ds.engine.checkpoint.shard_writer import ShardFiles
from pal_ds.engine.checkpoint.torch_archive import ForeignObjectError
from pal_ds.engine.checkpoint.verify import wait_for_files
from pal_ds.engine.training_engine import TrainingEngine
from pal_ds.errors import StorageError, UserError, writing
from pal_ds.io.fault_points import reached
from pal_ds.io.files import sync_to_disk, write_json
from pal_ds.io.sealed import FileEntry
from pal_ds.runs.run_dir import LatestCheckpoint, RunDirectory
from pal_ds.users import StoredUsers, TrainedUsers

logger = logging.getLogger(__name__)


def save_checkpoint(
    engine: TrainingEngine,
    users: TrainedUsers,
    run: RunDirectory,
    step: int,
    world: World,
    facts: TrainingFacts,
) -> Path:
    """Write `step_N/` with engine shards, user rows and a manifest, and publish it in latest.json.

    Every rank calls it; returns the directory.

    Raises:
        StorageError: on every rank, where any of them cannot write; what was there before is as it was.
    """
    final = run.checkpoint(step)
    temporary = final.with_name(final.name + ".tmp")

    def start() -> None:
        with writing(temporary):
            discard_leftovers(run)
            (temporary / ENGINE_FOLDER).mkdir(parents=True)

    def write_users() -> None:
        with writing(temporary):
            # From rank 0, whichever ranks hold its rows.
            users.save(temporary if world.is_rank_zero else None)

    def publish() -> None:
        with writing(temporary):
            reached("users written")
            _write_manifest(temporary, entries, step, facts, world)
            _publish(run, step, temporary)

    reached("save begins")
    try:
        world.from_rank_zero(start)
        reached("directory made")
        phase.enter("write shards")
        mine = _write_shards(engine, temporary, world)
        reached("shards written")
        entries = {name: entry for part in world.gather(mine) for name, entry in part.items()}
        phase.enter("write users")
        world.on_every_rank(write_users)
        phase.enter("publish the checkpoint")
        world.from_rank_zero(publish)
    except StorageError as error:
        # The room it took may be what the next try, or another program, needs.
        world.from_rank_zero(lambda: discard(temporary))
        raise StorageError(f"{error} Checkpoints saved before are intact.") from None
    return final


def _write_shards(engine: TrainingEngine, temporary: Path, world: World) -> dict[str, FileEntry]:
    """Write every rank's engine shards; return size and hash of this rank's. StorageError is raised on all ranks."""
    shards = ShardFiles()
    engine.checkpoint_engine = shards
    # Scripts that DeepSpeed would copy beside the tag, on one rank and without a net; tools/consolidate.py is ours.
    engine._copy_recovery_script = lambda _: None
    engine.save_checkpoint(
        str(temporary), tag=ENGINE_FOLDER, save_latest=False, exclude_frozen_parameters=True
    )
    return world.on_every_rank(lambda: shards.entries(temporary))


def _write_manifest(
    temporary: Path, entries: dict[str, FileEntry], step: int, facts: TrainingFacts, world: World
) -> None:
    """Write the manifest of all files in `temporary`, once everything is on the disk itself."""
    wait_for_files(temporary, entries)
    files = dict(entries)
    for path in temporary.rglob("*"):
        name = path.relative_to(temporary).as_posix()
        if path.is_file() and name not in files:
            files[name] = entry_of(path)
    reached("hashed")
    manifest: ManifestContent = {
        "world_size": world.world_size,
        "num_threads": torch.get_num_threads(),
        "step": step,
        **facts,
        "files": dict(sorted(files.items())),
    }
    write_manifest(temporary, manifest)
    for path in (*temporary.rglob("*"), temporary):
        if path.is_dir():
            sync_to_disk(path)
        mode = path.stat().st_mode
        if mode & stat.S_IWOTH:
            # Whatever this process's umask allows, no stranger may change a checkpoint. Asked for only then, as some
            # file systems know no chmod.
            path.chmod(mode & ~stat.S_IWOTH)
    reached("manifest written")


def _publish(run: RunDirectory, step: int, temporary: Path) -> None:
    """Give the finished directory its name and say so in latest.json; an older step of that name goes afterwards."""
    final = run.checkpoint(step)
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        discard(replaced)
        os.replace(final, replaced)
        reached("old step set aside")
    os.replace(temporary, final)
    sync_to_disk(final.parent)
    reached("renamed")
    latest: LatestCheckpoint = {"step": step, "path": str(final.relative_to(run.path))}
    write_json(run.path / "latest.json", latest)
    reached("latest.json written")
    discard(replaced)


def refuse_other_launch(path: Path, manifest: Manifest, dataset_hash: str, data_path: Path) -> None:
    """Raise UserError where a checkpoint was made from other data than this launch has; ranks may differ in number."""
    if manifest["dataset_hash"] != dataset_hash:
        raise UserError(
            f"{path}: trained on data with hash {manifest['dataset_hash']}, {data_path} has {dataset_hash}. "
            "Resume with the data it was trained on, or start in another --run_dir."
        )


def refuse_other_base(path: Path, manifest: Manifest, base_weights: str | None) -> None:
    """Raise UserError where the frozen weights that a checkpoint stands on are not those at hand."""
    if manifest.get("base_weights") != base_weights:
        raise UserError(
            f"{path}: trained on frozen weights {manifest.get('base_weights')}, backbone.path now holds "
            f"{base_weights}. Bring back the weights it was trained on."
        )


def load_checkpoint(
    engine: TrainingEngine, users: TrainedUsers, path: Path, manifest: Manifest, world: World
) -> None:
    """Restore weights, optimizer moments and user rows of the verified step `path` into a freshly built engine.

    Raises:
        ForeignObjectError: a shard names an object that reading it would run.
        UserError: the step does not fit the model or the users of this recipe.
    """
    if manifest["num_threads"] != torch.get_num_threads():
        logger.warning(
            "resuming with %d threads per rank, the checkpoint had %d: results may differ in the last bits",
            torch.get_num_threads(),
            manifest["num_threads"],
        )
    stored = StoredUsers(path)
    stored.refuse_removed(users.ids)
    engine.checkpoint_engine = shards_for(engine, path, world)
    try:
        users.restore(stored)
        loaded, _ = engine.load_checkpoint(str(path), tag=ENGINE_FOLDER, load_module_strict=False)
    except ForeignObjectError:
        raise
    except (RuntimeError, UserError) as error:
        raise UserError(
            f"{path}: does not fit the model of this recipe ({' '.join(str(error).split())[:300]}). "
            "A key that changes sizes cannot change on resume: restore it, or start in another --run_dir."
        ) from None
    # DeepSpeed answers None, with a warning, where it finds nothing: that must not become a fresh start.
    assert loaded is not None, f"DeepSpeed loaded nothing from {path}"
