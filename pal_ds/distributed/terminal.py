"""A terminal that is closed while a command works: what it still says goes nowhere, and must not end it."""

import contextlib
import errno
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


def leave_closed_terminal() -> None:
    """Point stdout and stderr at nothing where their terminal is gone: each line would raise an OSError (EIO)."""
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError as error:
            if error.errno != errno.EIO:
                continue  # closed from the start, say
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)


def _raise(_: int, __: FrameType | None) -> None:
    leave_closed_terminal()
    raise KeyboardInterrupt


@contextlib.contextmanager
def hangup_as_interrupt() -> Iterator[None]:
    """Let the end of the terminal, inside the block, raise KeyboardInterrupt, so that what was begun is tidied away.

    Not where it is ignored, as under `nohup`, or outside the main thread.
    """
    usual = signal.getsignal(signal.SIGHUP)
    if usual != signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGHUP, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, usual)
