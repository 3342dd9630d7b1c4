"""Retention of checkpoints: those that go are renamed first, so that a deletion cut short leaves no half a step."""

import logging
import os
import re
import shutil
from pathlib import Path

from pal_ds.distributed import phase
from pal_ds.errors import UserError
from pal_ds.io.fault_points import reached
from pal_ds.runs.run_dir import RunDirectory

logger = logging.getLogger(__name__)

GONE = ".gone"
"""Suffix of a directory that is being deleted."""
REPLACED = ".replaced"
"""Suffix of a step whose successor of the same number is being published."""
_LEFTOVER = re.compile(r"step_\d+(\.tmp|\.replaced|\.gone|\.tmp\.gone|\.replaced\.gone)")
_warned_of: set[Path] = set()
"""Directories that could not be deleted and have been warned of."""


def retain(run: RunDirectory, num_keep: int, best_step: int | None, now: int) -> None:
    """Delete all but the newest `num_keep` complete checkpoints, the best and the one that latest.json names.

    Checkpoints newer than `now`, where the run stands, are of a continuation that was given up (they were damaged
    when the run resumed from an older one): they count for nothing. A deletion that fails is complained of once and
    tried again next time.
    """
    keep = {best_step}
    try:
        keep.add((run.pointer("latest") or {}).get("step"))
    except UserError as error:
        # The next save writes it anew; a run does not end for it.
        logger.warning("%s", error)
    of_this_run = [step for step in run.complete_steps() if step <= now]
    keep |= set(of_this_run[-num_keep:])
    for step in run.all_steps():
        if step not in keep:
            discard(run.checkpoint(step))
            phase.progress()
            reached("a checkpoint deleted")
    discard_leftovers(run)


def discard_leftovers(run: RunDirectory) -> None:
    """Delete what interrupted saves and deletions left, to make room."""
    restore_replaced(run)
    for path in sorted(run.checkpoints.glob("step_*")):
        # Other names are not ours to delete: a person may keep a copy here.
        if _LEFTOVER.fullmatch(path.name):
            discard(path)


def discard(path: Path) -> None:
    """Delete a directory of a checkpoint, if it is there; from the first moment on it is none any more."""
    gone = path if path.name.endswith(GONE) else path.with_name(path.name + GONE)
    try:
        if path != gone and path.exists():
            # What an earlier deletion of the same name left would stand in the way.
            if gone.exists():
                shutil.rmtree(gone)
            os.replace(path, gone)
            reached("renamed for deletion")
        if gone.exists():
            shutil.rmtree(gone)
        _warned_of.discard(gone)
    except OSError as error:
        if gone not in _warned_of:
            logger.warning("%s: cannot be deleted (%s); it takes room until it can.", path, error)
            _warned_of.add(gone)


def restore_replaced(run: RunDirectory) -> None:
    """Give a step its name back whose replacement was cut off between two renames; the replacement is made again."""
    for aside in run.checkpoints.glob("step_*" + REPLACED):
        path = aside.with_name(aside.name.removesuffix(REPLACED))
        if not path.exists():
            os.replace(aside, path)
