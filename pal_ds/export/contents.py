"""The listing of an exported folder in export.json: written when all else is there, and held against the folder at each
opening.

Sizes, names and export.json itself are looked at every time. Hashes are taken at the first opening; a mark in this
user's cache then says that these very files (by device, inode, size and times) were sound, until one of them changes.
"""

import hashlib
import json
import logging
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pal_ds.distributed import phase
from pal_ds.errors import UserError
from pal_ds.export.card import FACTS_NAME, FORMAT_VERSION, ExportFacts, ImportedExport, RunExport
from pal_ds.io.boundary import check_form, reading
from pal_ds.io.files import feed
from pal_ds.io.text_files import parse_json

logger = logging.getLogger(__name__)

MARKS_VARIABLE = "PAL_DS_CACHE"
"""Environment variable: the folder for marks, in place of pal_ds in XDG_CACHE_HOME or ~/.cache."""
CARD = "README.md"
"""The one listed file that a person may edit."""
_OLDER = 1
"""The format before there were sizes and a checksum; its hashes are as good."""
_MAY_LACK = ("licence", "backbone", "family", "audience", "dtype", "user_marker_ids")
"""Facts that no reader needs."""
_NO_CHECKSUM = "0" * 64
_READ_BY_OTHERS = {".bin", ".jinja", ".json", ".model", ".pt", ".py", ".safetensors", ".so", ".txt"}
"""Endings of files that Python, transformers or tokenizers may read where they lie in a folder."""
_PICKLES = (".bin", ".pkl", ".pt", ".pth")
_REMEDY = "Copy the folder again, or export again."


def write_facts(
    folder: Path, facts: RunExport | ImportedExport, linked: dict[str, str] | None = None
) -> None:
    """Write export.json: the facts, and the size and sha256 of every other file; for links, the hash in `linked`."""
    files = sorted(path for path in folder.iterdir() if path.name != FACTS_NAME)
    hashes = {
        path.name: linked[path.name] if linked and path.is_symlink() else sha256_of(path)
        for path in files
    }
    sizes = {path.name: path.stat().st_size for path in files}
    own = {"checksum": _NO_CHECKSUM, "sizes": sizes, "sha256": hashes}
    text = json.dumps({**facts, **own}, indent=1) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / FACTS_NAME).write_text(text.replace(_NO_CHECKSUM, digest, 1))


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal."""
    return feed(hashlib.sha256(), path, phase.progress).hexdigest()


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the content of export.json, of a known format and unharmed. Raises UserError where it is neither."""
    file = folder / FACTS_NAME
    with reading(file, "listing of an exported folder", _REMEDY):
        content = file.read_bytes()
        facts = json.loads(content)
    version = facts.get("format_version") if isinstance(facts, dict) else None
    if version not in (_OLDER, FORMAT_VERSION):
        raise UserError(
            f"{file}: format {version}, this version reads {_OLDER} and {FORMAT_VERSION}. Export again."
        )
    checksum = str(facts.get("checksum"))
    blank = content.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1)
    older = version == _OLDER and "checksum" not in facts and "sizes" not in facts
    if not older and checksum != hashlib.sha256(blank).hexdigest():
        raise UserError(f"{file}: does not match its own checksum; it is damaged. {_REMEDY}")
    with reading(file, "listing of an exported folder", _REMEDY):
        check_form(facts, ExportFacts, optional=_MAY_LACK)
        hashes, sizes = facts.get("sha256", {}), facts.get("sizes", {})
        check_form(hashes, dict[str, str], "its sha256")
        check_form(sizes, dict[str, int], "its sizes")
    for name in (*hashes, *sizes):
        if not name or "/" in name or "\0" in name or name in (".", ".."):
            raise UserError(f"{file}: lists {name!r}, which is no file of this folder. {_REMEDY}")
    return facts


def verify_export(folder: Path, *, whole: bool | None = None) -> dict[str, Any]:
    """Return the facts of an exported folder that holds what its export.json lists, and nothing else that is read.

    Args:
        folder: what `consolidate` or `import-reference` wrote.
        whole: hash every file; None does so unless these very files were found to be sound before.

    Raises:
        UserError: a file is missing, cut, changed, of another export, or was added; or a config sends for code that
            lies elsewhere.
    """
    facts = read_facts(folder)
    hashes = facts["sha256"]
    _check_names(folder, hashes, facts.get("sizes", {}))
    mark = _mark_of(folder, hashes)
    if whole is True or mark is None or not mark.is_file():
        for name, digest in hashes.items():
            if name != CARD and sha256_of(folder / name) != digest:
                raise UserError(
                    f"{folder / name}: its content does not match the hash in {FACTS_NAME}: damaged, or of another "
                    f"export. {_REMEDY}"
                )
        if mark is not None:
            _set(mark)
    _check_config(folder / "config.json", hashes)
    _check_config(folder / "tokenizer_config.json", {})
    return facts


def _check_names(folder: Path, hashes: dict[str, str], sizes: dict[str, int]) -> None:
    if not any(name.endswith(".safetensors") for name in hashes):
        raise UserError(
            f"{folder / FACTS_NAME}: lists no safetensors, which hold weights. {_REMEDY}"
        )
    for name in hashes:
        file = folder / name
        if name == CARD:
            continue
        if file.suffix in _PICKLES:
            raise UserError(f"{file}: may be a pickle, which no export holds. {_REMEDY}")
        if not file.is_file():
            raise UserError(f"{file}: listed in {FACTS_NAME} but missing. {_REMEDY}")
        if name in sizes and file.stat().st_size != sizes[name]:
            raise UserError(
                f"{file}: {file.stat().st_size} bytes, {FACTS_NAME} says {sizes[name]}. {_REMEDY}"
            )
    for path in sorted(folder.iterdir()):
        is_read = path.suffix in _READ_BY_OTHERS or path.name == "additional_chat_templates"
        if is_read and path.name not in (FACTS_NAME, *hashes):
            raise UserError(
                f"{path}: is not listed in {FACTS_NAME}, and what opens the folder might read it. Take it out."
            )


def _check_config(file: Path, code: Collection[str]) -> None:
    """Raise UserError where a config names code that is not among these files, as that of another repository."""
    with reading(file, "config of an exported model", _REMEDY):
        content = {}
        if file.is_file():
            content = parse_json(file.read_text(encoding="utf-8"), str(file), f". {_REMEDY}")
    named = content.get("auto_map", {}) if isinstance(content, dict) else None
    if not isinstance(named, dict):
        raise UserError(f"{file}: is no config of an exported model. {_REMEDY}")
    for value in named.values():
        for target in value if isinstance(value, list) else [value]:
            if target is not None and f"{str(target).rpartition('.')[0]}.py" not in code:
                raise UserError(
                    f"{file}: auto_map names {target}, which is no code of this folder. {_REMEDY}"
                )
    for key, value in _keys(content):
        # transformers would fetch kernels from a repository of that name.
        if key.endswith("attn_implementation") and "/" in str(value):
            raise UserError(f"{file}: {key} is {value}, which is code elsewhere. {_REMEDY}")


def _keys(content: object) -> Iterator[tuple[str, object]]:
    for key, value in content.items() if isinstance(content, dict) else ():
        yield str(key), value
        yield from _keys(value)


def _mark_of(folder: Path, hashes: dict[str, str]) -> Path | None:
    """Return the mark that would say of these very files that they are sound; None where no mark can be believed."""
    facts = []
    for name in sorted(hashes):
        if name != CARD:
            of = (folder / name).stat()
            changed = of.st_mtime_ns, of.st_ctime_ns
            facts.append((name, hashes[name], of.st_dev, of.st_ino, of.st_size, *changed))
    digest = hashlib.sha256(json.dumps([str(folder.resolve()), facts]).encode()).hexdigest()
    place = os.environ.get(MARKS_VARIABLE)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    try:
        # RuntimeError: this user has no home.
        marks = Path(place or caches.expanduser() / "pal_ds", "exports")
    except RuntimeError as error:
        logger.info("no place for marks (%s): exported folders are hashed anew", error)
        return None
    try:
        marks.mkdir(parents=True, exist_ok=True)
        status = marks.stat()
    except OSError as error:
        logger.info("%s: no place for marks (%s): exported folders are hashed anew", marks, error)
        return None
    mine = status.st_uid == os.getuid() and not status.st_mode & stat.S_IWOTH
    return marks / digest if mine else None


def _set(mark: Path) -> None:
    try:
        mark.touch(mode=0o600)
    except OSError as error:
        logger.info("%s: cannot be made (%s): the folder is hashed anew next time", mark, error)
