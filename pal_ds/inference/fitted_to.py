"""The head that a user table was fitted to: its record beside the table, and the check of each command that reads one.

Logits of users mean something to the prototypes of one head alone: another head gives them other scores, and nothing
in the numbers shows it.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import TypedDict, cast

from pal_ds.errors import UserError
from pal_ds.heads.base import Head
from pal_ds.io.boundary import check_form, reading
from pal_ds.io.files import write_atomically
from pal_ds.io.sealed import is_intact, seal
from pal_ds.users.files import USER_FILES

logger = logging.getLogger(__name__)

RECORD = "fitted_to.json"
"""Name of the record beside a user table."""
_REMEDY = "Fit the users again with `pal-ds adapt`."


class FittedTo(TypedDict):
    """The model that users were fitted to."""

    run: str
    """Name of its folder, for messages."""
    step: int
    head: str
    """`head_hash` of its head."""


def head_hash(head: Head) -> str:
    """Return a hash of a head's class and tensors, 128 bits in hexadecimal; equal on every device."""
    digest = hashlib.blake2b(type(head).__name__.encode(), digest_size=16)
    for name, tensor in sorted(head.state_dict().items()):
        values = tensor.detach().float().cpu().contiguous()
        digest.update(f"\n{name} {tuple(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def write_record(folder: Path, fitted_to: FittedTo) -> None:
    """Write the record of the table in `folder`. Raises StorageError where it cannot be written."""
    write_atomically(folder / RECORD, seal(fitted_to, indent=1))


def read_record(folder: Path) -> FittedTo | None:
    """Return the record beside a table; None where an older version wrote the table, or another program.

    Raises:
        UserError: the record is damaged.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    with reading(file, "record of a user table", _REMEDY):
        content = file.read_bytes()
        record = json.loads(content)
        check_form(record, FittedTo)
    if not is_intact(content):
        raise UserError(f"{file}: does not match its own checksum; it is damaged. {_REMEDY}")
    return cast(FittedTo, {key: record[key] for key in FittedTo.__required_keys__})


def refuse_other_table(folder: Path | None, model: FittedTo, *, adapt_to: str) -> None:
    """Raise UserError where the users in `folder` were fitted to another head, or to another step, than `model`'s.

    A table without a record is read, with a warning. `adapt_to` names what to fit them to, in the remedy.
    """
    if folder is None or not (folder / USER_FILES[0]).is_file():
        return  # what reads the table says that it is missing
    record = read_record(folder)
    if record is None:
        logger.warning(
            "%s: holds no %s (an older version wrote it), so nothing says which run its users were fitted to; with "
            "another run, or another step, their scores are wrong",
            folder,
            RECORD,
        )
    elif (record["step"], record["head"]) != (model["step"], model["head"]):
        raise UserError(
            f"--users {folder}: its users were fitted to {_named(record)}, and this is {_named(model)} with another "
            f"head: their scores would be wrong. Fit them to this one: pal-ds adapt {adapt_to} --out FOLDER ..., or "
            "give the run and --step that they were fitted to."
        )


def _named(model: FittedTo) -> str:
    return f"step {model['step']} of {model['run']}"
