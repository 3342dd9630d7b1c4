"""A checkpoint as another number of ranks, or another ZeRO stage, would have written it.

DeepSpeed loads a checkpoint only into the world size that wrote it, and its universal checkpoint silently loses
parameter groups, frozen weights and buffers and lets all sub-groups share one step count. Here every rank makes its own
shard of the new layout from the slices it needs of the old ones: at resume in memory, where DeepSpeed would have read
a file (nothing is written, so nothing can be left over); offline as files, one after the other, which then take the
place of the old ones.
"""

import logging
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.forget import aside, put_in_place, recover
from pal_ds.engine.checkpoint.manifest import Manifest, entry_of, write_manifest
from pal_ds.engine.checkpoint.resharder import Resharder
from pal_ds.engine.checkpoint.shard_layout import Layout
from pal_ds.engine.checkpoint.shard_reader import ENGINE_FOLDER, ShardedCheckpoint
from pal_ds.engine.checkpoint.shard_writer import ShardFiles
from pal_ds.engine.checkpoint.torch_archive import ShardContent
from pal_ds.engine.checkpoint.verify import refuse_strangers_run, verify_checkpoint
from pal_ds.engine.training_engine import TrainingEngine
from pal_ds.errors import UserError, writing
from pal_ds.io.files import sync_to_disk
from pal_ds.io.sealed import FileEntry
from pal_ds.progress import progress_bar
from pal_ds.runs.lock import only_writer
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import USER_FILES

logger = logging.getLogger(__name__)


class ReshardedShards(ShardFiles):
    """Hands DeepSpeed what it would read from files of the new layout."""

    def __init__(self, model_states: ShardContent, optimizer_states: ShardContent) -> None:
        super().__init__()
        self._model_states, self._optimizer_states = model_states, optimizer_states

    def load(self, path: str, map_location: object = None) -> ShardContent:
        # DeepSpeed asks for the model's twice, then once for the optimizer's: then none need be kept here.
        if path.endswith("_model_states.pt"):
            return self._model_states
        states = self._optimizer_states
        self._model_states = self._optimizer_states = {}
        return states


def shards_for(engine: TrainingEngine, path: Path, world: World) -> ShardFiles:
    """Return what this engine reads the verified checkpoint `path` through: its files, or shards made anew.

    Every rank calls it right before `engine.load_checkpoint`; memory is one shard, as DeepSpeed's loading needs it.

    Raises:
        UserError: on every rank; the checkpoint is of another model, or cannot be resharded.
    """
    started = time.monotonic()
    new = Layout.of(engine.config, world.world_size)

    def differs() -> bool:
        checkpoint = ShardedCheckpoint(path)
        old = Layout.of(checkpoint.ds_config, checkpoint.world_size)
        # At stage 0 every rank reads the same file.
        return old != new and not (old.stage == new.stage == 0 and old.bf16 == new.bf16)

    def make() -> tuple[Resharder, ShardContent, ShardContent]:
        with writing(path):
            settings = [
                {key: value for key, value in group.items() if key != "params"}
                for group in engine.optimizer.param_groups
            ]
            resharder = Resharder(ShardedCheckpoint(path), new, engine.config, settings)
            _check_fits(engine, resharder)
            model_states = resharder.model_states(world.rank)
            return resharder, model_states, resharder.optimizer_states(world.rank)

    if not world.from_rank_zero(differs):
        return ShardFiles()
    resharder, model_states, optimizer_states = world.on_every_rank(make)
    shards = ReshardedShards(model_states, optimizer_states)
    # DeepSpeed looks for this rank's file by name before it asks `shards`: show it any that is there.
    by_name = engine._get_all_ckpt_names
    there = [str(next(resharder.checkpoint.path.glob("*_model_states.pt")))]
    engine._get_all_ckpt_names = lambda *arguments: (
        there if engine.checkpoint_engine is shards else by_name(*arguments)
    )
    if world.is_rank_zero:
        before, after = _describe(resharder.old, new), _describe(new, resharder.old)
        seconds = time.monotonic() - started
        logger.warning("resharded %s from %s to %s in %.1f s", path.name, before, after, seconds)
    return shards


def _check_fits(engine: TrainingEngine, resharder: Resharder) -> None:
    """Raise UserError where the shards would not be what this engine holds: its names, sizes, order and sub-groups."""
    path = resharder.checkpoint.path.parent
    held = [{n: tuple(s) for n, s in v.items()} for v in engine._get_zero_param_shapes()]
    made = [vector.shapes for vector in resharder.vectors]
    mine, stored = ({n: s for v in vectors for n, s in v.items()} for vectors in (held, made))
    for name in [*mine, *stored]:
        if mine.get(name) != stored.get(name):
            raise UserError(
                f"{path}: does not fit the model of this recipe ({name} is {stored.get(name, 'missing')} there, "
                f"{mine.get(name, 'missing')} here). A key that changes sizes cannot change on resume: restore it, or "
                "start in another --run_dir."
            )
    num_groups = len(engine.optimizer.param_groups)
    if [list(v.items()) for v in held] != [list(v.items()) for v in made] or num_groups != len(
        resharder.groups
    ):
        raise UserError(
            f"{path}: {_describe(resharder.old, resharder.new)} wrote it, and train.ds_config or optim now orders "
            f"parameters in a way that resharding does not know. Launch with {resharder.old.world_size} ranks and the "
            "settings of then."
        )


def _describe(layout: Layout, other: Layout) -> str:
    """Describe a layout in words: its ranks, and what else sets it off from the other."""
    words = [f"{layout.world_size} rank{'s' * (layout.world_size != 1)}"]
    if layout.stage != other.stage:
        words.append(f"at ZeRO-{layout.stage}")
    if layout.bf16 != other.bf16:
        words.append("in bf16" if layout.bf16 else "in fp32")
    if layout.offloads_optimizer != other.offloads_optimizer:
        words.append(f"{'with' if layout.offloads_optimizer else 'without'} optimizer offload")
    if layout.sub_group_size != other.sub_group_size and layout.stage == other.stage:
        words.append(f"in sub-groups of {layout.sub_group_size}")
    return " ".join(words)


def write_resharded(path: Path, out: Path, manifest: Manifest, world_size: int) -> Iterator[int]:
    """Write into `out` what the verified checkpoint `path` would be had `world_size` ranks written it.

    One process without a GPU or a process group; yields after each rank's shards how many bytes they take. The
    manifest is written last, everything is on the disk then, and `path` stays as it is. Memory is one shard.

    Raises:
        StorageError: `out` cannot be written; it is deleted.
        UserError: the checkpoint cannot be resharded.
    """
    checkpoint = ShardedCheckpoint(path)
    ds_config = dict(checkpoint.ds_config)
    micro = ds_config.get("train_micro_batch_size_per_gpu")
    if micro is not None and "train_batch_size" in ds_config:
        ds_config["train_batch_size"] = micro * world_size
    resharder = Resharder(checkpoint, Layout.of(ds_config, world_size), ds_config)
    shards, files = ShardFiles(), dict[str, FileEntry]()
    try:
        with writing(out):
            (out / ENGINE_FOLDER).mkdir(parents=True)
            for name in USER_FILES:
                shutil.copyfile(path / name, out / name)
                files[name] = entry_of(out / name)
            for rank in range(world_size):
                for name, make in resharder.files(rank).items():
                    shards.save(make(), str(out / ENGINE_FOLDER / name))
                files |= shards.entries(out)
                yield sum(entry["size"] for entry in files.values())
            listed = dict(sorted(files.items()))
            resharded: Manifest = {**manifest, "world_size": world_size, "files": listed}
            write_manifest(out, resharded)
            for folder in (out / ENGINE_FOLDER, out, out.parent):
                sync_to_disk(folder)
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def exchange_step(run: RunDirectory, world_size: int, step: str, *, trust: bool = False) -> str:
    """Rewrites a step (`latest`, `best` or a number) for `world_size` ranks, at least 1; returns what was done.

    Raises:
        BusyError: another process writes to the run.
        StorageError: the new step cannot be written; the old one is as it was.
        UserError: no such run or step, or a damaged checkpoint.
    """
    run.require_run()
    if not trust:
        refuse_strangers_run(run)
    with only_writer(run):
        # Gives a step its name back that an interrupted exchange, or removal of a user, left under another.
        recover(run)
        path = run.checkpoint(run.resolve_step(step))
        manifest = verify_checkpoint(path, trust=trust)
        before = manifest["world_size"]
        if before == world_size:
            return f"{path}: has world size {world_size} already"
        edited, _ = aside(path)
        shown = sys.stderr.isatty()
        with progress_bar("resharding", world_size, shown=shown, unit="bytes") as advance:
            for num_bytes in write_resharded(path, edited, manifest, world_size):
                advance(num_bytes)
        with writing(path):
            put_in_place(path)
    return f"{path}: resharded from world size {before} to {world_size}"
