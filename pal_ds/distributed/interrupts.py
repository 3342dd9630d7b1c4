"""A second Ctrl-C ends a process soon, even while its main thread is in native code, where no handler gets its turn.

Python calls a handler between two steps of its own. A number of every signal is written to a socket as soon as it
arrives, and a thread reads them there; it runs wherever native code lets go of the interpreter, as torch's does.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

SECONDS_TO_RAISE = 2.0
"""From the second Ctrl-C until the process ends without its main thread, which raises at once where it runs Python."""
SECONDS_TO_TIDY = 30.0
"""Time for what the main thread does once it has raised."""
SECONDS_TO_SAY = 8.0
EXIT_CODE = 130
_LEAVE = b"\0"
"""No signal has this number."""

before_a_sudden_end: list[Callable[[], object]] = []
"""Called before a process ends without its main thread: whom other ranks should hear of it from."""


class Interrupts:
    """Counts the Ctrl-Cs of this process as they arrive."""

    def __init__(self) -> None:
        self.num = 0
        self.has_raised, self._is_over = threading.Event(), threading.Event()
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        self._thread = threading.Thread(target=self._count, name="interrupts", daemon=True)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count in the block, which the main thread enters; the second one ends the process."""
        before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            signal.set_wakeup_fd(before)
            self._write.send(_LEAVE)
            self._thread.join()
            self._write.close()
            self._read.close()

    def _count(self) -> None:
        numbers = b""
        while _LEAVE not in numbers:
            numbers = self._read.recv(64)
            before = self.num
            self.num += numbers.count(signal.SIGINT)
            if before < 1 <= self.num:
                say_that_it_stops()
            if before < 2 <= self.num:
                threading.Thread(target=self._end, name="interrupted", daemon=True).start()

    def _end(self) -> None:
        if self.has_raised.wait(SECONDS_TO_RAISE):
            self._is_over.wait(SECONDS_TO_TIDY)
        if self._is_over.is_set():
            return
        telling = threading.Thread(target=_tell, daemon=True)
        telling.start()
        telling.join(SECONDS_TO_SAY)
        if not self._is_over.is_set():
            say("pal-ds: interrupted; the same command goes on from what is saved.\n")
            os._exit(EXIT_CODE)


def _tell() -> None:
    for call in list(before_a_sudden_end):
        call()


def say_that_it_stops() -> None:
    """Say, on rank 0, what the first Ctrl-C has done."""
    say("\nstopping: saves what is made; the same command resumes. Ctrl-C again ends at once.\n")


def say(text: str) -> None:
    """Write a line to stderr on rank 0; not through a logger, in the middle of one of whose calls a handler may run."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, text.encode())


def _forget_in_child() -> None:
    """Let a forked worker of a data loader write nothing to its parent's socket."""
    signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)
