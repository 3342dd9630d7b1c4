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
    num_entered: int
    """Phases entered so far in this process: it grows wherever there is progress."""
    num_in_step: int = 0
    """Of these, since `step` last changed: phases that one rank alone enters must not make it look ahead for ever."""

    def __str__(self) -> str:
        return f"{self.name} at update {self.step}"


STARTED = time.monotonic()
"""Of this process, near enough: the command line imports this module first."""

_current = Phase("start", 0, time.monotonic(), 0)


def enter(name: str, step: int | None = None) -> None:
    """Says that this process now begins `name`; `step` stays as it was where none is given."""
    global _current
    before = _current
    step = before.step if step is None else step
    num_in_step = before.num_in_step + 1 if step == before.step else 0
    _current = Phase(name, step, time.monotonic(), before.num_entered + 1, num_in_step)


def current() -> Phase:
    """The phase entered last."""
    return _current
