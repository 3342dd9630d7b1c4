"""What this process is doing now, for the watchdog and for messages about a rank that failed or hangs.

One value per process, like the logging configuration: code deep inside a long phase may name it without any plumbing.
"""

import time
from typing import NamedTuple


class Phase(NamedTuple):
    """A named stretch of work that should not last for ever."""

    name: str
    step: int
    """Updates made so far; of the run, not of this start."""
    since: float
    """time.monotonic() at its begin."""
    count: int
    """Phases entered so far in this process: it grows wherever there is progress."""

    def __str__(self) -> str:
        return f"{self.name} at update {self.step}"


_current = Phase("start", 0, time.monotonic(), 0)


def enter(name: str, step: int | None = None) -> None:
    """Says that this process now begins `name`; `step` stays as it was where none is given."""
    global _current
    _current = Phase(
        name, _current.step if step is None else step, time.monotonic(), _current.count + 1
    )


def current() -> Phase:
    """The phase entered last."""
    return _current
