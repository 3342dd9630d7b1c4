"""The phase that this process is in, for the watchdog and for messages about a rank that failed or hangs.

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
    """Phases entered and marks of progress so far in this process: it grows wherever there is any."""
    num_in_step: int = 0
    """Phases entered since `step` last changed: those of one rank alone must not make it look ahead for ever."""
    patience: float = 1.0
    """Factor by which this phase may take longer than others: for code of others that calls no `progress`."""

    def __str__(self) -> str:
        return f"{self.name} at update {self.step}"


STARTED = time.monotonic()
"""Monotonic time at which this process started, near enough: the command line imports this module first."""

_current = Phase("start", 0, time.monotonic(), 0)


def enter(name: str, step: int | None = None, *, patience: float = 1.0) -> None:
    """Note that this process now begins `name`; `step` stays as it was where none is given."""
    global _current
    before = _current
    step = before.step if step is None else step
    num_in_step = before.num_in_step + 1 if step == before.step else 0
    _current = Phase(name, step, time.monotonic(), before.num_entered + 1, num_in_step, patience)


def progress() -> None:
    """Note that the current phase goes on; costs a microsecond, so loops over megabytes may call it each time round.

    Ranks move different amounts of bytes, so this leaves `num_in_step` alone, by which they are compared.
    """
    global _current
    _current = _current._replace(num_entered=_current.num_entered + 1)


def current() -> Phase:
    """Return the phase that was entered last."""
    return _current
