"""Rank 0's side of the watchdog's connections: hears every rank, judges, and tells the verdict."""

import contextlib
import hmac
import logging
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pal_ds.distributed.watchdog.heartbeat import Beat, Failure, Ledger, Verdict, spoken
from pal_ds.distributed.watchdog.link import (
    HELD_SOCKETS,
    LONGEST_LINE,
    AwakeClock,
    Lines,
    Message,
    as_line,
    prepared,
)

logger = logging.getLogger(__name__)


SECONDS_TO_SHOW_TOKEN = 10.0
SECONDS_FOR_LATE_RANKS = 12.0
"""Time that rank 0, where the job ends, still waits for ranks that start: they would look for it until the limit."""
MOST_STRANGERS = 64
"""Open connections that have shown no token, beyond one for each rank."""


@dataclass
class _Stranger:
    """A connection that has not shown the token yet."""

    since: float
    shown: bytes = b""


class Coordinator:
    """Rank 0's side: hears everyone, judges, and tells the verdict. `run` is for a thread of its own."""

    def __init__(
        self,
        world_size: int,
        ledger: Ledger,
        interval: float,
        beat: Callable[[], Beat],
        learn: Callable[[Verdict], None],
    ) -> None:
        self._world_size, self._ledger, self._interval = world_size, ledger, interval
        self._beat, self._learn = beat, learn
        self._clock = AwakeClock(2 * interval)
        self._slept, self._woke_at = 0.0, float("-inf")
        self._verdict: Verdict | None = None
        self._own_failures: list[Failure] = []
        self._closing, self._alone = threading.Event(), threading.Event()
        self._ranks: dict[socket.socket, int] = {}
        self._lines: dict[socket.socket, Lines] = {}
        self._strangers: dict[socket.socket, _Stranger] = {}
        self._selector = selectors.DefaultSelector()
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._listener: socket.socket | None = None
        self.token = secrets.token_hex(16)
        self.port = 0
        if world_size > 1:
            self._listener = _listener()
            self.port = self._listener.getsockname()[1]
            self._selector.register(self._listener, selectors.EVENT_READ)

    @property
    def stacks(self) -> Path | None:
        """Folder of the stacks, for messages."""
        return self._ledger.stacks

    @stacks.setter
    def stacks(self, stacks: Path | None) -> None:
        self._ledger.stacks = stacks

    def report(self, failure: Failure) -> None:
        """Report rank 0's own failure, from any thread."""
        self._own_failures.append(failure)
        self._wake.send(b"!")

    def wait_for_verdict(self, seconds: float) -> None:
        """Wait until the others have heard the verdict and left, at most so long; longer where some are yet to come."""
        is_early = self._ledger.awaits(self._clock.now)
        self._alone.wait(max(seconds, SECONDS_FOR_LATE_RANKS) if is_early else seconds)

    def close(self) -> None:
        """Tell the others that the watch is over; from another thread."""
        self._closing.set()
        with contextlib.suppress(OSError):  # the thread saw it first, and has closed this, too
            self._wake.send(b"!")

    def run(self) -> None:
        try:
            next_beat = 0.0
            self._ledger.hear(self._beat(), self._clock.now)
            while not self._closing.is_set():
                for key, _ in self._selector.select(max(0.0, next_beat - time.monotonic())):
                    self._serve(key.fileobj)  # type: ignore[arg-type]
                self._drop_strangers()
                slept = self._clock.tick()
                if slept:
                    self._slept, self._woke_at = slept, self._clock.now
                if time.monotonic() >= next_beat:
                    self._ledger.hear(self._beat(), self._clock.now)
                    next_beat = time.monotonic() + self._interval
                self._settle()
        except Exception:
            logger.exception(
                "The watchdog itself failed (a bug): training goes on without it, and train.timeout_minutes holds."
            )
        finally:
            self._tell_all({"bye": True})
            self._alone.set()
            own = (self._listener, self._wake, self._woken)
            for connection in (*self._strangers, *self._lines, *filter(None, own)):
                connection.close()
            self._selector.close()

    def _settle(self) -> None:
        while self._own_failures:
            self._ledger.hear(self._beat(), self._clock.now)
            self._ledger.failed(self._own_failures.pop(0), self._clock.now)
        if self._verdict is None:
            self._verdict = self._ledger.verdict(self._clock.now)
            if self._verdict is not None:
                if (
                    self._verdict.kind == "died"
                    and self._clock.now - self._woke_at <= self._interval
                ):
                    # The others have taken leave of a rank 0 that was stopped for a while: it is to blame.
                    asleep = f"rank 0 itself was stopped, or stuck in native code, for {spoken(self._slept)}"
                    text = f"{asleep}; meanwhile {self._verdict.text}"
                    self._verdict = self._verdict._replace(ranks=(0,), text=text)
                # Here first: others may leave at once, and launchers then end this process, too.
                self._learn(self._verdict)
                self._tell_all({"verdict": self._verdict})
        is_alone = not self._ranks and not self._ledger.awaits(self._clock.now)
        if self._verdict is not None and is_alone:
            self._alone.set()

    def _serve(self, ready: socket.socket) -> None:
        if ready is self._listener:
            with contextlib.suppress(OSError):  # whoever it was has gone again
                connection = prepared(ready.accept()[0])
                connection.setblocking(False)
                self._strangers[connection] = _Stranger(self._clock.now)
                self._selector.register(connection, selectors.EVENT_READ)
        elif ready is self._woken:
            ready.recv(64)
        else:
            try:
                data = ready.recv(LONGEST_LINE)
                keep = bool(data) and self._hear(ready, data)
            except BlockingIOError:
                return
            # Whatever one connection brings, the watch over the others goes on.
            except Exception as error:
                rank = self._ranks.get(ready)
                logger.debug("watchdog: connection of rank %s: %s", rank, type(error).__name__)
                keep = False
            if not keep:
                self._drop(ready)

    def _hear(self, connection: socket.socket, data: bytes) -> bool:
        """Return True where the connection stays. Nothing is parsed before it has shown the ranks' secret token."""
        stranger = self._strangers.get(connection)
        if stranger is not None:
            stranger.shown += data
            own = self.token.encode() + b"\n"
            if len(stranger.shown) < len(own):
                return True
            if not hmac.compare_digest(stranger.shown[: len(own)], own):
                return False
            data = stranger.shown[len(own) :]
            del self._strangers[connection]
            self._lines[connection] = Lines()
        messages = self._lines[connection].feed(data)
        return all(self._take(connection, message) for message in messages)

    def _drop_strangers(self) -> None:
        """Close connections that have not shown the token in time, and the first of too many: ranks show it at once."""
        too_many = len(self._strangers) - self._world_size - MOST_STRANGERS
        for place, (connection, stranger) in enumerate(list(self._strangers.items())):
            if place < too_many or self._clock.now - stranger.since > SECONDS_TO_SHOW_TOKEN:
                self._drop(connection)

    def _take(self, connection: socket.socket, message: Message) -> bool:
        """Take a message in; return True where the connection stays. The first must name a rank that has none yet."""
        is_new = connection not in self._ranks
        if is_new:
            rank = message["rank"]
            known = range(1, self._world_size)
            if type(rank) is not int or rank not in known or rank in self._ranks.values():
                return False
            self._ranks[connection] = rank
        elif "bye" in message:
            self._ledger.left(self._ranks.pop(connection))
            return False
        beat = Beat(*message["beat"])._replace(rank=self._ranks[connection])
        self._ledger.hear(beat, self._clock.now)
        if "failed" in message:
            self._ledger.failed(Failure(*message["failed"]), self._clock.now)
        self._tell(connection, {"beat": self._ledger.latest(0)})
        if is_new and self._verdict is not None:
            self._tell(connection, {"verdict": self._verdict})
        return True

    def _drop(self, connection: socket.socket) -> None:
        rank = self._ranks.pop(connection, None)
        self._lines.pop(connection, None)
        self._strangers.pop(connection, None)
        self._selector.unregister(connection)
        connection.close()
        if rank is not None:
            self._ledger.died(rank, self._clock.now)

    def _tell(self, connection: socket.socket, message: Message) -> None:
        try:
            connection.send(as_line(message))
        except OSError as error:
            # It will show as the end of the connection, or as silence.
            logger.debug("watchdog: rank %s: %s", self._ranks.get(connection), error)

    def _tell_all(self, message: Message) -> None:
        for connection in list(self._ranks):
            self._tell(connection, message)


def _listener() -> socket.socket:
    """Return a socket that listens on any free port, of either family where the system has both."""
    listener = None
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # compiled in, and switched off
            options: dict[str, Any] = {"family": socket.AF_INET6, "dualstack_ipv6": True}
            listener = socket.create_server(("", 0), backlog=1024, **options)
    listener = listener or socket.create_server(("", 0), backlog=1024)
    HELD_SOCKETS.add(listener)
    return listener
