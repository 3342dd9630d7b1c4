"""Stopping on request: a signal or the clock sets a flag, the ranks agree on it between two updates, one checkpoint.

A signal may reach one rank or all of them, once or often, in the middle of a collective; so a handler only notes it.
"""

import contextlib
import logging
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from pal_ds.distributed import phase
from pal_ds.distributed.interrupts import Interrupts, say_that_it_stops
from pal_ds.distributed.terminal import leave_closed_terminal
from pal_ds.errors import UnfinishedError

if TYPE_CHECKING:
    from pal_ds.distributed.world import World

logger = logging.getLogger(__name__)


class StopRequested(Exception):  # noqa: N818  (it is a request, not an error)
    """Raised on every rank alike in the middle of work that can be left and made again."""


FROM_A_TERMINAL = ("INT", "HUP")
"""Ctrl-C, and the end of the terminal: requests to stop, too. A second Ctrl-C ends the process at once."""
_noted: list[int] = []
"""Numbers of the stop signals that reached this process."""
_counted: list[Interrupts] = []
"""Of `listening` blocks that end the process."""


def _note(number: int, _: FrameType | None) -> None:
    if number == signal.SIGHUP:
        leave_closed_terminal()
    _noted.append(number)


def _note_once(number: int, frame: FrameType | None) -> None:
    counted = _counted[-1] if _counted else None
    # Two that arrive while native code runs call this once.
    if number in _noted or (counted is not None and counted.num > 1):
        if counted is not None:
            counted.has_raised.set()
        signal.default_int_handler(number, frame)
    _noted.append(number)
    if counted is None:
        say_that_it_stops()


def stop_is_requested() -> bool:
    """Return True where a stop signal has reached this process; others may not have got one."""
    return bool(_noted)


def refuse_to_go_on(what: str) -> None:
    """Raise UnfinishedError where a stop signal has reached this process; `what` is done when it does.

    For work of one process, as others may have got no signal: ranks agree by `StopWatch.leave_if_requested`.
    """
    if stop_is_requested():
        raise UnfinishedError(
            f"{what}. The same command begins it anew (exit code {UnfinishedError.exit_code})."
        )


@contextlib.contextmanager
def listening(names: Sequence[str], *, may_end_process: bool = False) -> Iterator[None]:
    """Take, inside the block, signals of these names (`USR2`, `TERM`) as requests to stop; they end no process.

    So are Ctrl-C, once, and the end of the terminal, where the process did not ignore them before, as under `nohup`.
    A second Ctrl-C raises KeyboardInterrupt; with `may_end_process`, it ends the process where native code keeps the
    main thread from raising it. A notebook must live on.
    """
    numbers = [signal.Signals[f"SIG{name}"] for name in names]
    for number in (signal.Signals[f"SIG{name}"] for name in FROM_A_TERMINAL):
        if number not in numbers and signal.getsignal(number) != signal.SIG_IGN:
            numbers.append(number)
    _noted.clear()
    before = [
        (number, signal.signal(number, _note_once if number == signal.SIGINT else _note))
        for number in numbers
    ]
    with contextlib.ExitStack() as held:
        held.callback(_noted.clear)
        for number, handler in before:
            held.callback(signal.signal, number, handler)
        if may_end_process:
            interrupts = Interrupts()
            held.enter_context(interrupts.counted())
            _counted.append(interrupts)
            held.callback(_counted.remove, interrupts)
        yield


def ignore_stop_signals(names: Sequence[str]) -> None:
    """Ignore stop signals in a data loader's worker: it must not die of what asks its rank to save first."""
    for name in (*names, *FROM_A_TERMINAL):
        signal.signal(signal.Signals[f"SIG{name}"], signal.SIG_IGN)


@dataclass
class StopWatch:
    """Knows how long updates, evaluations and saves take, and says when the ranks should stop.

    With a time limit the run stops when what is left would not surely hold another update, a due evaluation and a
    save, each taken as long as the longest so far (the save twice: file systems vary).
    """

    time_limit_minutes: float | None = None
    save_seconds: float | None = None
    """Longest save; of an earlier start, where a checkpoint tells. Unknown: a twentieth of the limit is set aside."""
    _longest: dict[str, float] = field(default_factory=dict)
    _lap_began: float = field(default_factory=time.monotonic)

    def begin_lap(self) -> None:
        """Note that an update begins, with the wait for its batches."""
        self._lap_began = time.monotonic()

    def end_lap(self) -> None:
        """Note that the update is made."""
        self._note("update", time.monotonic() - self._lap_began)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Measure an `evaluation` or a `save`."""
        begin = time.monotonic()
        yield
        self._note(what, time.monotonic() - begin)

    def _note(self, what: str, seconds: float) -> None:
        if what == "save":
            self.save_seconds = max(self.save_seconds or 0.0, seconds)
        else:
            self._longest[what] = max(self._longest.get(what, 0.0), seconds)

    def out_of_time(self, *, evaluation_due: bool) -> bool:
        """Return True where another update might not be followed by a save within the limit."""
        if self.time_limit_minutes is None:
            return False
        limit = 60 * self.time_limit_minutes
        needed = limit / 20 if self.save_seconds is None else 2 * self.save_seconds
        for what in ("update", "evaluation") if evaluation_due else ("update",):
            needed += self._longest.get(what, 0.0)
        return time.monotonic() - phase.STARTED + needed > limit

    def reason_to_stop(self, world: "World", *, evaluation_due: bool) -> str | None:
        """Return `signal`, `time limit` or None, the same on every rank; all ranks call it, between two updates."""
        # The clock of rank 0 counts; a signal counts wherever it arrived.
        late = world.is_rank_zero and self.out_of_time(evaluation_due=evaluation_due)
        signalled, late = world.any_rank(stop_is_requested(), late)
        if signalled:
            return "signal"
        return "time limit" if late else None

    def leave_if_requested(self, world: "World") -> None:
        """Raise StopRequested with the reason, on every rank, where a stop is asked for."""
        if reason := self.reason_to_stop(world, evaluation_due=False):
            raise StopRequested(reason)
