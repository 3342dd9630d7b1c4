"""Exchanges a step of a run for the same step of another number of ranks."""

import shutil
import sys

from pal_ds.engine.checkpoint.forget import EDITED, OLD, recover
from pal_ds.engine.checkpoint.manifest import verify_checkpoint
from pal_ds.engine.checkpoint.reshard import write_resharded
from pal_ds.errors import writing
from pal_ds.io.files import sync_to_disk
from pal_ds.progress import progress_bar
from pal_ds.runs.lock import only_writer
from pal_ds.runs.run_dir import RunDirectory


def exchange_step(run: RunDirectory, world_size: int, step: str, *, trust: bool = False) -> str:
    """Rewrites a step (`latest`, `best` or a number) for `world_size` ranks, at least 1; returns what was done.

    Raises:
        BusyError: another process writes to the run.
        StorageError: the new step cannot be written; the old one is as it was.
        UserError: no such run or step, or a damaged checkpoint.
    """
    run.require_run()
    with only_writer(run):
        # Gives a step its name back that an interrupted exchange, or removal of a user, left under another.
        recover(run)
        path = run.checkpoint(run.resolve_step(step))
        manifest = verify_checkpoint(path, trust=trust)
        before = manifest["world_size"]
        if before == world_size:
            return f"{path}: has world size {world_size} already"
        edited, old = path.with_name(EDITED + path.name), path.with_name(OLD + path.name)
        shown = sys.stderr.isatty()
        with progress_bar("resharding", world_size, shown=shown, unit="bytes") as advance:
            for num_bytes in write_resharded(path, edited, manifest, world_size):
                advance(num_bytes)
        with writing(path):
            path.rename(old)
            edited.rename(path)
            sync_to_disk(path.parent)
            shutil.rmtree(old)
    return f"{path}: resharded from world size {before} to {world_size}"
