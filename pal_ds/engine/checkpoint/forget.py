"""Removal of a person who asks to be forgotten, from every checkpoint of a run and every evaluation of it.

At every moment each step is whole under its own name or under one of two names that training and its clean-up do
not look at; `recover` gives an interrupted step its name back.
"""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TypedDict

from pal_ds.engine.checkpoint.manifest import FormatError, Manifest, entry_of, write_manifest
from pal_ds.engine.checkpoint.verify import refuse_strangers_run, verify_checkpoint
from pal_ds.errors import BusyError, StorageError, UserError
from pal_ds.io.files import replacing, sync_to_disk, write_json
from pal_ds.runs.lock import only_writer
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import USER_FILES, UserTable

logger = logging.getLogger(__name__)

EDITED, OLD = "edited-", "old-"
"""Prefixes of a step while it is exchanged; not `step_*`, of which retention deletes what is no complete step."""


class Forgotten(TypedDict):
    """Record of what the removal of a user changed."""

    user_id: str
    steps: list[int]
    evaluations: list[str]
    """Names of the changed files in D/eval."""


def forget_user(run: RunDirectory, user_id: str, *, trust: bool = False) -> Forgotten:
    """Remove a user from all checkpoints and evaluation files; return what was changed. `trust`: as for `open_run`.

    The raw and prepared data are not this run's to change: the caller says so.

    Raises:
        UserError: no checkpoint of the run holds this user, or one that does is damaged; nothing was changed.
    """
    run.require_run()
    if not trust:
        refuse_strangers_run(run)
    with only_writer(run):
        recover(run)
        held = [(step, run.checkpoint(step)) for step in run.complete_steps()]
        held = [(step, path) for step, path in held if user_id in UserTable.load(path)]
        if not held:
            raise UserError(
                f"--remove {user_id}: no checkpoint of {run.path} holds this user; --list shows who is there."
            )
        manifests = {path: verify_checkpoint(path, trust=trust) for _, path in held}
        # Checkpoints last: as long as one holds the user, an interrupted removal can be asked for again.
        figures, rows = sorted(run.eval.glob("*.json")), sorted(run.eval.glob("*.parquet"))
        changed = [path.name for path in figures if _rewrite_figures(path, user_id)]
        changed += [path.name for path in rows if _rewrite_rows(path, user_id)]
        for leftover in run.path.glob("pairs-of-*.tables*"):
            # What an evaluation that was killed left of a file of pairs, all its users included.
            shutil.rmtree(leftover)
        _forget_in_origin(run, user_id)
        for path, manifest in manifests.items():
            _rewrite_checkpoint(path, manifest, user_id)
    return {"user_id": user_id, "steps": [step for step, _ in held], "evaluations": changed}


def recover(run: RunDirectory) -> None:
    """Finish the exchange of steps that `forget_user` was interrupted in; does nothing where none was.

    For the only writer of the run: a copy that another process is writing would be deleted.

    Raises:
        FormatError: a copy is of another version of pal_ds; nothing was deleted.
        UserError: a step has lost its name and neither copy of it is intact; nothing was deleted.
    """
    copies = _copies_aside(run)
    for name in sorted({path.name.removeprefix(EDITED).removeprefix(OLD) for path in copies}):
        path = run.checkpoints / name
        edited, old = aside(path)
        if not path.exists() and edited.exists():
            try:
                verify_checkpoint(edited)
                edited.rename(path)
            except FormatError:
                raise
            except UserError:
                if old.exists():
                    verify_checkpoint(old)
                    old.rename(path)
        # An old copy without an edited one was replaced before: it must not come back, the user is in it.
        for leftover in (edited, old):
            shutil.rmtree(leftover, ignore_errors=True)
        sync_to_disk(run.checkpoints)


def finish_interrupted_removal(run: RunDirectory) -> None:
    """Call `recover` for a reader of the run; where another process writes it, say so in the log and leave it alone."""
    if not _copies_aside(run):
        return
    try:
        # Whose copies these are: under the lock nobody is writing them any more.
        with only_writer(run, wait_seconds=0):
            recover(run)
    except (BusyError, StorageError) as error:
        logger.warning("a step is being exchanged; listed is what is whole now (%s)", error)


def _copies_aside(run: RunDirectory) -> list[Path]:
    return [path for stage in (EDITED, OLD) for path in run.checkpoints.glob(f"{stage}step_*")]


def aside(path: Path) -> tuple[Path, Path]:
    """Return the paths of the edited and the old copy of a step while one takes the other's place."""
    return path.with_name(EDITED + path.name), path.with_name(OLD + path.name)


def put_in_place(path: Path) -> None:
    """Exchange a step for its complete edited copy; `recover` finishes this wherever it is interrupted."""
    edited, old = aside(path)
    path.rename(old)
    edited.rename(path)
    sync_to_disk(path.parent)
    shutil.rmtree(old)


def _rewrite_checkpoint(path: Path, manifest: Manifest, user_id: str) -> None:
    table = UserTable.load(path)
    table.remove(user_id)
    edited, _ = aside(path)
    left_out = shutil.ignore_patterns(*USER_FILES, "manifest.json")
    shutil.copytree(path, edited, copy_function=_link, ignore=left_out)
    table.save(edited)
    files = {**manifest["files"], **{name: entry_of(edited / name) for name in USER_FILES}}
    without: Manifest = {**manifest, "files": files}
    write_manifest(edited, without)
    sync_to_disk(edited)
    sync_to_disk(path.parent)
    put_in_place(path)


def _forget_in_origin(run: RunDirectory, user_id: str) -> None:
    """Remove the user from the table in D/init, where the run started from another's."""
    if not (run.init / USER_FILES[0]).is_file():
        return
    table = UserTable.load(run.init)
    if user_id not in table:
        return
    table.remove(user_id)
    edited = run.init / "users.tmp"
    table.save(edited)
    for name in USER_FILES:
        sync_to_disk(edited / name)
        os.replace(edited / name, run.init / name)
    edited.rmdir()
    sync_to_disk(run.init)


def _link(source: str, target: str) -> None:
    """Link or copy a shard: shards are large and never written again, so two copies of a step may share them."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
        sync_to_disk(Path(target))


def _rewrite_figures(path: Path, user_id: str) -> bool:
    """Remove the user from a JSON of figures; return True where the user was in it."""
    figures = json.loads(path.read_text())
    holds_user = False
    for section in (figures, figures.get("unknown_users", {})):
        users = section.get("users")
        if isinstance(users, dict) and users.pop(user_id, None) is not None:
            holds_user = True
    if holds_user:
        write_json(path, figures)
    return holds_user


def _rewrite_rows(path: Path, user_id: str) -> bool:
    """Remove the user's row from a Parquet table; return True where there was one."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    kept = table.filter(pc.field("user_id") != user_id)
    if len(kept) == len(table):
        return False
    with replacing(path) as edited:
        pq.write_table(kept, edited)
    return True
