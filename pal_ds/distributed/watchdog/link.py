"""The watchdog's own connections: every rank tells rank 0 how it is, and rank 0 tells everyone when the job must end.

Plain sockets rather than torch's store: a store's client blocks for as long as its server is stopped, and its server
does not say when a client dies. Here the end of a process closes its socket at once, a lost node is found by the
kernel within `SECONDS_TO_LOSE_A_NODE`, and nothing ever waits without a limit. One line of JSON per message.
"""

import contextlib
import json
import logging
import os
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pal_ds.distributed.watchdog.heartbeat import Beat, Failure, Verdict, died_verdict, spoken

logger = logging.getLogger(__name__)

SECONDS_TO_SEND = 10
SECONDS_TO_LOSE_A_NODE = 60
LONGEST_LINE = 1 << 16
Message = dict[str, Any]
"""Keys that a rank sends: `rank`, `beat`, `failed`, `bye`; rank 0: `beat`, `verdict`, `bye`; each only where needed."""

HELD_SOCKETS: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _close_in_child() -> None:
    """Close connections in a forked worker of a data loader: it must not keep those of a killed rank alive."""
    for held in list(HELD_SOCKETS):
        held.close()


os.register_at_fork(after_in_child=_close_in_child)


def prepared(connection: socket.socket) -> socket.socket:
    """Make a connection fail when the other node does not answer; a busy or stopped process is no lost node."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_NODELAY", 1),
        ("TCP_KEEPIDLE", SECONDS_TO_LOSE_A_NODE // 4),
        ("TCP_KEEPINTVL", SECONDS_TO_LOSE_A_NODE // 4),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", 1000 * SECONDS_TO_LOSE_A_NODE),
    ):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    HELD_SOCKETS.add(connection)
    return connection


def as_line(message: Message) -> bytes:
    """Return a message as the bytes that travel."""
    return json.dumps(message).encode() + b"\n"


class Lines:
    """Messages out of the bytes of a connection."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that `data` completes. Raises ValueError for what is no message of ours."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        if max(map(len, (*lines, self._pending))) > LONGEST_LINE:
            raise ValueError("a line that is too long")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not a message")
        return messages


class AwakeClock:
    """Seconds that this process was awake: a job that a scheduler suspends for an hour has not hung for an hour."""

    def __init__(self, longest_tick: float) -> None:
        self.now = 0.0
        self._longest_tick = longest_tick
        self._last = time.monotonic()

    def tick(self) -> float:
        """Move the clock on; return the seconds that it left out."""
        now = time.monotonic()
        passed, self._last = now - self._last, now
        self.now += min(passed, self._longest_tick)
        return max(0.0, passed - self._longest_tick)


class Link:
    """The connection of a rank other than 0. `run` is for a thread of its own."""

    def __init__(
        self,
        address: tuple[str, int],
        token: str,
        interval: float,
        silence_seconds: float,
        stacks: Path | None,
        beat: Callable[[], Beat],
        learn: Callable[[Verdict], None],
    ) -> None:
        """Connect to rank 0. Raises OSError where rank 0 cannot be reached or does not know this rank."""
        self._interval, self._silence_seconds = interval, silence_seconds
        self.stacks = stacks
        self._beat, self._learn = beat, learn
        self._clock, self._heard_at = AwakeClock(2 * interval), 0.0
        self._closing, self._lock, self._lines = threading.Event(), threading.Lock(), Lines()
        self._socket = prepared(socket.create_connection(address, timeout=SECONDS_TO_LOSE_A_NODE))
        own = beat()
        self._socket.sendall(token.encode() + b"\n" + as_line({"rank": own.rank, "beat": own}))
        messages: list[Message] = []
        while not messages:
            messages = self._receive()
        # A rank that comes late hears at once how it all ended.
        self._root, self._pending = Beat(*messages[0]["beat"]), messages[1:]
        self._socket.settimeout(SECONDS_TO_SEND)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)

    def report(self, failure: Failure) -> None:
        """Report this rank's own failure, from any thread."""
        self._send({"failed": failure, "beat": self._beat()})

    def wait_for_verdict(self, seconds: float) -> None:
        """Do nothing: rank 0 tells the others."""

    def close(self) -> None:
        """Take leave of rank 0; from another thread."""
        self._closing.set()
        self._send({"bye": True})
        with contextlib.suppress(OSError):  # rank 0 was faster
            self._socket.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        try:
            while not self._closing.is_set():
                self._send({"beat": self._beat()})
                if not self._listen(time.monotonic() + self._interval):
                    break
        except Exception:
            logger.exception(
                "The watchdog of this rank failed (a bug): training goes on without it."
            )
            self.close()
        finally:
            self._selector.close()
            self._socket.close()

    def _send(self, message: Message) -> None:
        try:
            with self._lock:
                self._socket.sendall(as_line(message))
        except OSError as error:
            # What rank 0 said last may still wait to be read; then its end shows there.
            logger.debug("watchdog: rank 0: %s", error)

    def _receive(self) -> list[Message]:
        data = self._socket.recv(LONGEST_LINE)
        if not data:
            raise ConnectionError("rank 0 closed the connection")
        return self._lines.feed(data)

    def _listen(self, until: float) -> bool:
        """Take messages in until then; return False when there is nothing more to watch."""
        while (left := until - time.monotonic()) > 0 and not self._closing.is_set():
            messages, self._pending = self._pending, []
            ready = not messages and self._selector.select(left)
            self._clock.tick()
            try:
                messages = self._receive() if ready else messages
            except OSError:
                if not self._closing.is_set():
                    age = self._clock.now - self._heard_at
                    self._blame_root(died_verdict(self._root, age, self.stacks).text)
                return False
            for message in messages:
                if "bye" in message:
                    return False
                if "verdict" in message:
                    kind, ranks, text, code = message["verdict"]
                    self._learn(Verdict(kind, tuple(ranks), text, code))
                    return False
                self._root, self._heard_at = Beat(*message["beat"]), self._clock.now
            silence = self._clock.now - self._heard_at
            if silence > self._silence_seconds:
                self._blame_root(
                    f"rank 0 on {self._root.host} has sent no sign of life for {spoken(silence)}, since it was in "
                    f"{self._root}: its process is stopped, or stuck in native code."
                )
                return False
        return True

    def _blame_root(self, text: str) -> None:
        own = self._beat()
        self._learn(Verdict("died", (0,), f"{text} This is rank {own.rank}, in {own}."))
