"""Exceptions that end a command with one message and its own exit code; anything else is a bug and shows a traceback.

| code | meaning | start again? |
|---|---|---|
| 0 | finished, or stopped on request after saving (`status.json` of the run says which) | resumes, if stopped |
| 1 | a bug: the traceback says where | |
| 2 | bad input, recipe or command line | after mending it |
| 3 | too many updates skipped (not finite, or spikes), or the last weights are not finite | after mending the recipe |
| 4 | a file could not be written (full, quota, read-only), or handles or memory ran out | once there is room |
| 5 | another rank died, hung or failed | yes, resumes |
| 6 | another process writes to the run directory | later, as it is |
| 75 | stopped on request before the end: `embed`, `compare` (what is done is kept), data in preparation | yes |
| 130 | interrupted from the keyboard, or its terminal was closed | yes, resumes |
"""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

TEMPORARY = r"\.tmp-[^/]*"
"""What a file or folder has behind its name until it is whole."""


class UserError(ValueError):
    """Bad input or configuration. The message says what was wrong, where, the rule and the remedy."""

    exit_code = 2


class LauncherError(UserError):
    """The environment names a rank and not where ranks meet. Each rank says so: nobody else may be there to do it."""


class NumericError(UserError):
    """Updates could not be made: loss or gradients were not finite too often."""

    exit_code = 3


class StorageError(UserError):
    """A file could not be written: no space, over quota, read-only, no permission, no handle, or the device failed.

    Memory that ran out is one of these, too: what the machine lacks, and neither the recipe nor a file."""

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
    errno.ENOTDIR: "A part of that path is a file: name another place",
    errno.EEXIST: "A file is where a folder is to be: name another place",
    errno.EIO: "The device or its network failed: see the system's log",
    errno.EFBIG: "The file would be larger than allowed there: see `ulimit -f`",
    errno.EMFILE: "Allow more of them with `ulimit -n`",
    errno.ENFILE: "The whole machine has too few: ask its administrator",
    errno.ENOMEM: "Give the job more memory and threads, and see `ulimit -a`",
}
"""By the error numbers of a file system or machine that cannot take what it is given."""
_OF_PROCESS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_OF_READERS = (*_OF_PROCESS, errno.EIO, errno.ENOSPC, errno.EDQUOT)
"""What no file is to blame for, though its reader found that it cannot be read."""
_UNSAID = (errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EEXIST)
"""Numbers whose words a library may say of something else."""
_NUMBERS_OF_TEXTS = {
    r"\d+ requested and \d+ written|PytorchStreamWriter failed writing": errno.ENOSPC,
    r"DefaultCPUAllocator|bad_alloc|start new thread|failed to map segment": errno.ENOMEM,
    "Resource temporarily unavailable": errno.ENOMEM,
    **{re.escape(os.strerror(n)): n for n in _REMEDIES if n not in _UNSAID},
}
"""What libraries say (numpy, torch, gloo, safetensors, tokenizers, the loader of modules) that raise no number."""
_MAX_SHOWN_CHARACTERS = 300
"""So much of a library's own words goes into a message."""


def _number_of(error: BaseException) -> int | None:
    """Return the number of an error that `_REMEDIES` has, or None."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and isinstance(error, MemoryError):
        number = errno.ENOMEM
    if number is None and not isinstance(error, UserError):
        texts = _NUMBERS_OF_TEXTS.items()
        number = next((found for text, found in texts if re.search(text, str(error))), None)
    return number if number in _REMEDIES else None


def storage_error(error: BaseException, path: Path | str | None = None) -> StorageError | None:
    """Return the StorageError to show for what the disk or the machine refused, or None for another kind of error.

    `path` is what was being written; an OSError that names a file itself knows better.
    """
    number = _number_of(error)
    if number is None:
        return None
    where = getattr(error, "filename", None) or path or (number not in _OF_PROCESS and "a file")
    # What is written aside is known by the name that it was to get.
    named = f"{re.sub(TEMPORARY, '', str(where))}: cannot be written or read" if where else None
    message = f"{named or 'this process cannot go on'}: {os.strerror(number)}. {_REMEDIES[number]}, and start again."
    if not isinstance(error, OSError | MemoryError):
        # The number is a guess from a library's words: whoever looks for the cause needs them.
        message += (
            f" ({type(error).__name__}: {' '.join(str(error).split())[:_MAX_SHOWN_CHARACTERS]})"
        )
    return StorageError(message)


def without_stop(said: object) -> str:
    """Return what was said without its full stop, to go on behind it.

    >>> without_stop("It is empty."), without_stop("such as ...")
    ('It is empty', 'such as ...')
    """
    text = str(said).rstrip()
    return text if text.endswith("..") else text.removesuffix(".")


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and what led to it, each once: an error may be the context of its own cause."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def mendable(error: BaseException) -> UserError | None:
    """Return what a person can mend about an error: itself, or what the machine refused; None for a bug."""
    if isinstance(error, UserError) and error.exit_code != UserError.exit_code:
        return error
    allowed = _OF_READERS if isinstance(error, UserError) else tuple(_REMEDIES)
    for cause in chain_of(error):
        if isinstance(cause, StorageError):
            return cause
        if _number_of(cause) in allowed:
            return storage_error(cause)
    return error if isinstance(error, UserError) else None


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


def end_with(error: Exception, program: str, *, joins_ranks: bool = True) -> NoReturn:
    """End a program for what a person can mend: one line and the exit code; raises a bug again.

    Of ranks that say the same, rank 0 speaks; a program that joins none speaks whatever RANK is in its environment.
    """
    shown = mendable(error)
    if shown is None:
        raise error
    alone = not joins_ranks or isinstance(shown, LauncherError)
    speaks = alone or os.environ.get("RANK", "0") == "0"
    if speaks and not getattr(shown, "is_printed", False):
        # Who asked for a stop and gets it has made no mistake.
        kind = "" if isinstance(shown, UnfinishedError) else "error: "
        print(f"{program}: {kind}{shown}", file=sys.stderr)
    sys.exit(shown.exit_code)
