"""An exported folder per user, all on the same weights.

Users of one run differ by the mixture in config.json alone, so OUT/_shared is an ordinary export (for
the population) and OUT/USER has a config.json, card and export.json of its own beside relative links to
the rest. Links, not hard links: `cp -r`, `rsync -a` and `tar` keep them, and would turn each hard link
into a whole copy of the weights. OUT moves as one; a single user's folder is copied with `cp -rL`.
"""

import hashlib
import json
import re
from pathlib import Path

from pal_ds.errors import UserError
from pal_ds.export import card, contents
from pal_ds.export.audience import mixtures_of, posteriors_of
from pal_ds.export.folder import ExportOptions, fill_folder, open_for_export
from pal_ds.inference.load_run import trained_head
from pal_ds.io.files import new_folder
from pal_ds.io.text_files import text_lines
from pal_ds.progress import progress_bar
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable
from pal_ds.users.ids import POPULATION_USER

SHARED = "_shared"
INDEX = "users.json"
_OWN = {"config.json", "README.md", card.FACTS_NAME}
_PLAIN = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")


def export_users(
    run: RunDirectory, out: Path, user_ids: list[str], options: ExportOptions | None = None
) -> card.RunExport:
    """Write `out` with a folder per user, `_shared` and users.json; return the facts of `_shared`.

    Raises:
        UserError: as `export` does, and for options that name someone else, a user who is unknown or a
            head without users.
        StorageError: `out` cannot be written; no folder of that name was made.
    """
    options = options or ExportOptions()
    one = (options.user, options.mixture, options.group)
    if any(who is not None for who in one) or options.with_users:
        raise UserError(
            "a list of users makes one export for each of them: leave out --user, --group, --mixture "
            "and --with_users."
        )
    opened = open_for_export(run, out, options)
    head = trained_head(opened)
    if not head.is_personal:
        raise UserError(
            f"{type(head).__name__} has one reward for everyone: leave out the list of users."
        )
    mixtures = mixtures_of(head, opened.users, user_ids, options.users_dir).tolist()
    posteriors = posteriors_of(user_ids, mixtures, options.users_dir)
    folders = {user_id: folder_name(user_id) for user_id in user_ids}
    assert len(set(folders.values())) == len(user_ids), "folder names must tell users apart"
    with new_folder(out) as folder:
        shared = folder / SHARED
        shared.mkdir()
        facts = fill_folder(shared, opened, options)
        with progress_bar("users", len(user_ids), shown=not options.quiet, unit="users") as advance:
            for name, mixture, posterior in zip(
                folders.values(), mixtures, posteriors, strict=True
            ):
                _write_user(folder / name, shared, facts, mixture, posterior)
                advance(1)
        text = json.dumps(folders, indent=1, ensure_ascii=False)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")
    return facts


def folder_name(user_id: str) -> str:
    """Return a folder name that every file system takes and that depends on the id alone.

    Short ids of lower-case letters, digits and . _ - inside are their own name. Others keep what is
    legible of them and get a hash of the whole, so Alice and alice stay apart where case does not count.

    >>> folder_name("alice"), folder_name("Alice")
    ('alice', 'alice-3bc51062973c458d')
    """
    if _PLAIN.fullmatch(user_id) and user_id != INDEX:
        return user_id
    legible = re.sub(r"[^a-z0-9]+", "-", user_id.lower()).strip("-")[:40].strip("-")
    return f"{legible or 'user'}-{hashlib.sha256(user_id.encode()).hexdigest()[:16]}"


def read_user_list(given: str | Path) -> list[str]:
    """Read the user ids of a file, one a line, or of a text with commas between.

    Raises:
        UserError: the file is missing, none is named, or one is named twice.
    """
    in_file = Path(given).exists() or "," not in str(given)
    lines = text_lines(Path(given)) if in_file else map(str.strip, str(given).split(","))
    seen: dict[str, int] = {}
    for number, user_id in enumerate(lines, start=1):
        if user_id in seen:
            where = f"stands on line {seen[user_id]}" if in_file else "is named"
            at = f":{number}" if in_file else ""
            raise UserError(
                f"--users {given}{at}: {user_id!r} {where} already; list every user once."
            )
        if user_id:
            seen[user_id] = number
    if not seen:
        raise UserError(f"--users {given}: names no user; give one id a line.")
    return list(seen)


def users_of(adapted: Path) -> list[str]:
    """Return the ids of a folder that `adapt` wrote, without a generic user.

    Raises:
        UserError: it holds no user table, or a table of nobody.
    """
    ids = [user_id for user_id in UserTable.load(adapted).ids if user_id != POPULATION_USER]
    if not ids:
        raise UserError(f"--users {adapted}: holds no user. Give a folder that `adapt` wrote.")
    return ids


def _write_user(
    folder: Path,
    shared: Path,
    shared_facts: card.RunExport,
    mixture: list[float],
    posterior: dict[str, object] | None,
) -> None:
    folder.mkdir()
    for file in shared.iterdir():
        if file.name not in _OWN:
            (folder / file.name).symlink_to(Path("..") / SHARED / file.name)
    config = json.loads((shared / "config.json").read_text()) | {"mixture": mixture}
    if posterior is not None:
        config["posterior"] = posterior
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    facts: card.RunExport = {
        **shared_facts,
        "audience": "one user",
        "mixture": mixture,
        "measured_for": ", measured for the population on the same weights",
    }
    card.write_card(folder, facts)
    hashes = json.loads((shared / card.FACTS_NAME).read_text())["sha256"]
    contents.write_facts(folder, facts, linked=hashes)
