"""Texts to score, read from JSON Lines or from memory: every key that looks as if it mattered is read or refused."""

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pal_ds.data.parse import check_name, check_response, text_of_field
from pal_ds.data.records import Text, Tools, check_tools
from pal_ds.data.sources.base import check_files, read_lines
from pal_ds.errors import UserError
from pal_ds.io.files import at_home
from pal_ds.io.text_files import refuse_halves, refuse_non_finite

logger = logging.getLogger(__name__)

STANDARD_INPUT = Path("/dev/stdin")
_READ = ("prompt", "response", "text", "tools", "user_id", "group")
_RENAME = (
    "if it matters here, it is {} that is. Rename it, or give it a name that says it is a note."
)
_ONE_ANSWER = "a line holds one answer, as 'response'. Write a line for each of them."
_REMEDIES = {
    **{key.replace("_", ""): _RENAME.format(f"'{key}'") for key in _READ},
    **dict.fromkeys(("user", "users", "userids"), _RENAME.format("'user_id'")),
    **dict.fromkeys(("groups", "groupid", "groupname"), _RENAME.format("'group'")),
    **dict.fromkeys(
        ("system", "systemprompt"),
        "a system message is the first message of 'prompt', as in "
        '[{"role": "system", "content": "..."}, {"role": "user", "content": "..."}].',
    ),
    "messages": "give the messages before the answer as 'prompt', and the answer, the last message, as 'response'.",
    "prompts": "a line holds one prompt, as 'prompt'. Write a line for each of them.",
    "responses": _ONE_ANSWER,
    "texts": "a line holds one text, as 'text'. Write a line for each of them.",
    "tool": _RENAME.format("'tools'"),
    **dict.fromkeys(
        ("mixture", "mixtures", "weights"),
        _RENAME.format("--mixture of the command, or the user_id of a line,"),
    ),
}
"""What to do about keys that look as if a score depended on them, in small letters alone; those that are read, too."""


class Row(NamedTuple):
    """A line of the input: `text`, or `prompt` and `response`."""

    where: str
    record: Mapping[str, Any]
    text: str | None
    prompt: Text | None
    response: Text | None
    tools: Tools | None = None
    user_id: str | None = None
    group: str | None = None


def read_rows(path: Path) -> list[Row]:
    """The lines of a JSONL file, checked; `-` is the standard input, and a pipe is read once.

    Raises:
        UserError: the file is missing or empty, or a line is no such record; names file and line.
    """
    path = STANDARD_INPUT if str(path) == "-" else at_home(path)
    if not path.exists():
        raise UserError(f"--input {path}: no such file (looked from {Path.cwd()}).")
    if path.is_dir():
        raise UserError(f"--input {path}: is a folder; name the file in it.")
    if path.stat().st_size:
        check_files(path)
    rows = [_checked(record, where) for where, record in read_lines(path)]
    if not rows:
        raise UserError(f"--input {path}: is empty; give one JSON object per line.")
    return rows


def warn_of_scored(rows: Iterable[Row]) -> None:
    """Tell of lines with a "score" of their own, such as this command's output has: the new one takes its place."""
    scored = [row.where for row in rows if "score" in row.record]
    if scored:
        logger.warning(
            "%s and %d other lines have a 'score' already; what is written has the model's in its place. Rename "
            "the key to keep both.",
            scored[0],
            len(scored) - 1,
        )


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Records in memory, each of `text`, or `prompt` and `response`, checked as lines of a file are.

    Raises:
        UserError: there is none, or one is no such record; counted from 1.
    """
    rows = [_checked(record, f"record {n}") for n, record in enumerate(records, start=1)]
    if not rows:
        raise UserError(
            "texts: is empty; give a dict of prompt and response, or of text, for each."
        )
    return rows


def _checked(record: object, where: str) -> Row:
    if not isinstance(record, Mapping):
        raise UserError(f"{where}: a line must be a JSON object, not {type(record).__name__}.")
    refuse_halves(dict(record), where)
    refuse_non_finite(dict(record), where)
    for key in record:
        plain = re.sub(r"[\W_]", "", str(key)).lower()
        if plain in _REMEDIES and key not in _READ:
            raise UserError(f"{where}: the key '{key}' is not read; {_REMEDIES[plain]}")
    user_id, group = (check_name(record, key, where) for key in ("user_id", "group"))
    if "text" in record:
        if not isinstance(record["text"], str) or not record["text"].strip():
            raise UserError(f"{where}: 'text' must be a string that is not empty.")
        others = [key for key in ("prompt", "response", "tools") if record.get(key) is not None]
        if others:
            raise UserError(
                f"{where}: holds both 'text' and '{others[0]}'; give prompt and response, or text."
            )
        return Row(where, record, record["text"], None, None, None, user_id, group)
    for key in ("prompt", "response"):
        if key not in record:
            pair = key == "response" and {"chosen", "rejected"} & record.keys()
            hint = f" For 'chosen' and 'rejected', {_ONE_ANSWER}" if pair else ""
            raise UserError(f"{where}: has no '{key}'. Give prompt and response, or text.{hint}")
    prompt, response = (_text(record[key], where, key) for key in ("prompt", "response"))
    tools = record.get("tools")
    tools = None if tools is None else check_tools(tools, where) or None
    return Row(where, record, None, prompt, response, tools, user_id, group)


def _text(value: object, where: str, key: str) -> Text:
    if not isinstance(value, str | list) or (key == "response" and value in ("", [])):
        raise UserError(f"{where}: '{key}' must be a string that is not empty, or chat messages.")
    if isinstance(value, str) and key == "response" and not value.strip():
        raise UserError(f"{where}: '{key}' must be a string that is not empty, or chat messages.")
    text = text_of_field(value, where, key)
    if key == "response":
        check_response(text, where, key)
    return text
