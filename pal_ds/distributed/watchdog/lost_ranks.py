"""Errors by which a rank notices that another one is gone, against errors of its own."""

import contextlib
import logging
import os
import traceback
from collections.abc import Iterator

from pal_ds.distributed.world import World
from pal_ds.errors import RankLostError, mendable

logger = logging.getLogger(__name__)

MEETING_FILES = ("/torch/distributed/", "/deepspeed/", World.from_rank_zero.__code__.co_filename)
"""Where ranks meet: torch and DeepSpeed raise there when a peer is gone, `World` what rank 0 could not do."""


watches: list[object] = []
"""The watch that is on from the start of this process, if there is one: it finds the cause of what a meeting raises."""


@contextlib.contextmanager
def meeting() -> Iterator[None]:
    """Let ranks meet before a watch could say which of them is gone.

    Raises:
        RankLostError: one of them ended meanwhile, or cannot be reached; told on every rank that sees it.
    """
    try:
        yield
    except RuntimeError as error:
        # Of its own: handles or memory ran out.
        if watches or not is_symptom(error) or mendable(error) is not None:
            raise
        reason = str(error).strip().partition("\n")[0]
        lost = RankLostError(
            f"the ranks could not meet ({reason}). Another one ended, or cannot be reached at MASTER_ADDR and "
            "MASTER_PORT: what it printed says why. Start again once that is mended."
        )
        if os.environ.get("RANK", "0") != "0":
            logger.error("rank %s: %s", os.environ["RANK"], lost)
        raise lost from error


def is_symptom(error: BaseException) -> bool:
    """Return True where an error was raised where ranks meet, as it is when a peer is gone."""
    frames = list(traceback.walk_tb(error.__traceback__))
    place = frames[-1][0].f_code.co_filename if frames else ""
    return isinstance(error, RuntimeError) and any(part in place for part in MEETING_FILES)


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of the command line for an error."""
    if (shown := mendable(error)) is not None:
        return shown.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 130 if isinstance(error, KeyboardInterrupt) else 1


def one_line(error: BaseException) -> str:
    """Return a line about an error, for other ranks."""
    shown = mendable(error)
    text = " ".join(str(shown or error).split())[:1000]
    name = [] if shown else [type(error).__name__]
    return ": ".join([*name, *filter(None, [text])])
