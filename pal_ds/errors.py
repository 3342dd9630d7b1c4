"""Exceptions that end a command with one message and its own exit code; anything else is a bug and shows a traceback.

| code | meaning | start again? |
|---|---|---|
| 0 | finished, or stopped on request after saving (`status.json` of the run says which) | resumes, if stopped |
| 1 | a bug: the traceback says where | |
| 2 | bad input, recipe or command line | after mending it |
| 3 | too many updates in a row had to be skipped (loss or gradients not finite, or spikes) | after mending the recipe |
| 4 | a file could not be written (disk full, quota, read-only); earlier checkpoints are intact | once there is room |
| 5 | another rank died, hung or failed | yes, resumes |
| 6 | another process writes to the run directory | later, as it is |
| 75 | `embed` or `compare` was stopped on request before its end; what is done is kept | yes, goes on |
| 130 | interrupted from the keyboard | yes, resumes |
"""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn


class UserError(ValueError):
    """Bad input or configuration. The message says what was wrong, where, the rule and the remedy."""

    exit_code = 2


class LauncherError(UserError):
    """The environment names a rank and not where ranks meet. Each rank says so: nobody else may be there to do it."""


class NumericError(UserError):
    """Updates could not be made: loss or gradients were not finite too often."""

    exit_code = 3


class StorageError(UserError):
    """A file could not be written: no space, over quota, read-only, no permission, or the device failed."""

    exit_code = 4


class RankLostError(UserError):
    """Another rank died, hung or failed, so this one cannot go on."""

    exit_code = 5
    is_printed = False
    """True where the watchdog has printed the message already."""


class BusyError(UserError):
    """Another process writes to the run directory; nothing needs mending, it only has to end."""

    exit_code = 6


class UnfinishedError(UserError):
    """Stopped on request before the end, by a command that keeps no status: only its exit code can say so."""

    exit_code = 75


_THIS_USER_MAY_NOT = "This user may not: mend the permissions, or name another place"
_REMEDIES = {
    errno.ENOSPC: "Make room there",
    errno.EDQUOT: "Make room there, or ask for more quota",
    errno.EROFS: "It is mounted read-only: name another place",
    errno.EACCES: _THIS_USER_MAY_NOT,
    errno.EPERM: _THIS_USER_MAY_NOT,
    errno.EIO: "The device or its network failed: see the system's log",
    errno.EFBIG: "The file would be larger than allowed there: see `ulimit -f`",
}
"""By the error numbers of a file system that cannot take what it is given."""


def storage_error(error: BaseException, path: Path | str | None = None) -> StorageError | None:
    """Return the StorageError to show for a failed write, or None where `error` is of another kind.

    `path` is what was being written; an OSError that names a file itself knows better.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and type(error).__name__ == "SafetensorError":
        # safetensors raises a class of its own, which tells the number in its text alone.
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
    if number not in _REMEDIES:
        return None
    where = getattr(error, "filename", None) or path or "a file"
    return StorageError(
        f"{where}: cannot be written or read: {os.strerror(number)}. {_REMEDIES[number]}, and start again."
    )


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Raise StorageError where a file inside the block cannot be written because of where it lies."""
    try:
        yield
    except Exception as error:
        shown = storage_error(error, path)
        if shown is None:
            raise
        raise shown from error


def end_with(error: UserError | OSError, program: str, *, joins_ranks: bool = True) -> NoReturn:
    """End a program for what a person can mend: one line and the exit code; raises a bug again.

    Of ranks that say the same, rank 0 speaks; a program that joins none speaks whatever RANK is in its environment.
    """
    shown = error if isinstance(error, UserError) else storage_error(error)
    if shown is None:
        raise error
    alone = not joins_ranks or isinstance(shown, LauncherError)
    speaks = alone or os.environ.get("RANK", "0") == "0"
    if speaks and not getattr(shown, "is_printed", False):
        # Who asked for a stop and gets it has made no mistake.
        kind = "" if isinstance(shown, UnfinishedError) else "error: "
        print(f"{program}: {kind}{shown}", file=sys.stderr)
    sys.exit(shown.exit_code)
