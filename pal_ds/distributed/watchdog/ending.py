"""Last steps of a process that ends, which must neither hide why it ends nor keep it alive."""

import logging
import os
import threading
from collections.abc import Callable
from typing import TextIO

from pal_ds.errors import StorageError

logger = logging.getLogger(__name__)


def forget(_: str) -> None:
    """Tell nobody of a loss."""


def record(on_loss: Callable[[str], None], reason: str) -> None:
    """Call `on_loss`; where it cannot write, the end goes on as it would have."""
    try:
        on_loss(reason)
    except (OSError, StorageError) as error:
        logger.warning("the end of the run could not be recorded: %s", error)


def own_stderr() -> TextIO | None:
    """Open a descriptor of stderr of the caller's own, as DeepSpeed points the process's elsewhere while it compiles.

    None where this process has no stderr.
    """
    try:
        return open(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    except OSError:
        return None


def within(seconds: float, work: Callable[[], object]) -> None:
    """Do `work`, and go on without it where it takes longer."""

    def do() -> None:
        try:
            work()
        except Exception:
            logger.exception("the watchdog could not do all it should before the end")

    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    thread.join(seconds)
