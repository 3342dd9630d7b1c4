"""A person asks to be forgotten: the user's row leaves every checkpoint of a run and every evaluation of it."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from pal_ds.engine.checkpoint import hash_file, verify_checkpoint
from pal_ds.errors import UserError
from pal_ds.run_dir import RunDirectory, write_json
from pal_ds.users import UserTable


def list_users(run: RunDirectory, step: str = "latest") -> list[tuple[str, list[float]]]:
    """(user id, mixture softmax(w_u)) of every user of a checkpoint."""
    run.require_run()
    table = UserTable.load(run.checkpoint(run.resolve_step(step)))
    return list(zip(table.ids, table.mixtures().tolist(), strict=True))


def forget_user(run: RunDirectory, user_id: str) -> dict[str, Any]:
    """Removes a user from all checkpoints and evaluation files; says what was changed.

    The raw and prepared data are not this run's to change: the report says so.

    Raises:
        UserError: no checkpoint of the run holds this user.
    """
    run.require_run()
    steps = [
        step for step in run.complete_steps() if user_id in UserTable.load(run.checkpoint(step))
    ]
    if not steps:
        raise UserError(
            f"--remove {user_id}: no checkpoint of {run.path} holds this user; --list shows who is there."
        )
    for step in steps:
        _rewrite_checkpoint(run.checkpoint(step), user_id)
    changed = [
        path.name for path in sorted(run.eval.glob("*.json")) if _rewrite_evaluation(path, user_id)
    ]
    return {"user_id": user_id, "steps": steps, "evaluations": changed}


def _rewrite_checkpoint(path: Path, user_id: str) -> None:
    """A new directory takes the old one's name, so that an interruption leaves one of the two whole."""
    manifest = verify_checkpoint(path)
    table = UserTable.load(path)
    table.remove(user_id)
    edited, old = path.with_name(path.name + ".edited.tmp"), path.with_name(path.name + ".old.tmp")
    for leftover in (edited, old):
        shutil.rmtree(leftover, ignore_errors=True)
    names = ("users.safetensors", "users.arrow")
    shutil.copytree(
        path, edited, copy_function=os.link, ignore=shutil.ignore_patterns(*names, "manifest.json")
    )
    table.save(edited)
    for name in names:
        file = edited / name
        manifest["files"][name] = {"size": file.stat().st_size, "xxh3_128": hash_file(file)}
    write_json(edited / "manifest.json", manifest)
    path.rename(old)
    edited.rename(path)
    shutil.rmtree(old)


def _rewrite_evaluation(path: Path, user_id: str) -> bool:
    figures = json.loads(path.read_text())
    found = False
    for section in (figures, figures.get("unknown_users", {})):
        users = section.get("users")
        if isinstance(users, dict) and users.pop(user_id, None) is not None:
            found = True
    if found:
        write_json(path, figures)
    return found
