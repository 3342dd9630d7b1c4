"""The watchdog's own connections: every rank tells rank 0 how it is, and rank 0 tells everyone when the job must end.

Plain sockets rather than torch's store: a store's client blocks for as long as its server is stopped, and its server
does not say when a client dies. Here the end of a process closes its socket at once, a lost node is found by the
kernel within `SECONDS_TO_LOSE_A_NODE`, and nothing ever waits without a limit. One line of JSON per message.
"""

import json
import os
import socket
import time
import weakref
from typing import Any

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
