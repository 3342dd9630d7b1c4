"""Exceptions that end a command with one message and its own exit code; anything else is a bug and shows a traceback.

| code | meaning | start again? |
|---|---|---|
| 0 | finished, or stopped on request after saving (`status.json` of the run says which) | resumes, if stopped |
| 1 | a bug: the traceback says where | |
| 2 | bad input, recipe or command line | after mending it |
| 3 | too many updates in a row had to be skipped (loss or gradients not finite, or spikes) | after mending the recipe |
| 4 | a file could not be written (disk full, quota, read-only); earlier checkpoints are intact | once there is room |
| 5 | another rank died, hung or failed | yes, resumes |
| 130 | interrupted from the keyboard | yes, resumes |
"""

import errno


class UserError(ValueError):
    """Bad input or configuration. The message says what was wrong, where, the rule and the remedy."""

    exit_code = 2


class NumericError(UserError):
    """Updates could not be made: loss or gradients were not finite too often."""

    exit_code = 3


class StorageError(UserError):
    """A file could not be written: no space, over quota, read-only, no permission, or the device failed."""

    exit_code = 4


class RankLostError(UserError):
    """Another rank died, hung or failed, so this one cannot go on."""

    exit_code = 5


STORAGE_ERRNOS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG)
)
