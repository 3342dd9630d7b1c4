"""Every other rank's side of the watchdog's connections: tells rank 0 how it is, and hears the verdict."""

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable

from pal_ds.distributed.watchdog.heartbeat import Beat, Failure, Verdict, died_verdict, spoken
from pal_ds.distributed.watchdog.lines import (
    LONGEST_LINE,
    SECONDS_TO_LOSE_A_NODE,
    AwakeClock,
    Lines,
    Message,
    as_line,
    prepared,
)

logger = logging.getLogger(__name__)

SECONDS_TO_SEND = 10


class Link:
    """The connection of a rank other than 0. `run` is for a thread of its own."""

    def __init__(
        self,
        address: tuple[str, int],
        token: str,
        interval: float,
        silence_seconds: float,
        stacks: str,
        beat: Callable[[], Beat],
        learn: Callable[[Verdict], None],
    ) -> None:
        """Connect to rank 0. Raises OSError where rank 0 cannot be reached or does not know this rank."""
        self._interval, self._silence_seconds, self._stacks = interval, silence_seconds, stacks
        self._beat, self._learn = beat, learn
        self._clock, self._heard_at = AwakeClock(2 * interval), 0.0
        self._closing, self._lock, self._lines = threading.Event(), threading.Lock(), Lines()
        self._socket = prepared(socket.create_connection(address, timeout=SECONDS_TO_LOSE_A_NODE))
        own = beat()
        self._socket.sendall(token.encode() + b"\n" + as_line({"rank": own.rank, "beat": own}))
        messages: list[Message] = []
        while not messages:
            messages = self._receive()
        self._root = Beat(*messages[0]["beat"])
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
            ready = self._selector.select(left)
            self._clock.tick()
            try:
                messages = self._receive() if ready else []
            except OSError:
                if not self._closing.is_set():
                    age = self._clock.now - self._heard_at
                    self._learn(self._of_root(died_verdict(self._root, age, self._stacks).text))
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
                self._learn(
                    self._of_root(
                        f"rank 0 on {self._root.host} has sent no sign of life for {spoken(silence)}, since it was in "
                        f"{self._root}: its process is stopped, or stuck in native code."
                    )
                )
                return False
        return True

    def _of_root(self, text: str) -> Verdict:
        own = self._beat()
        return Verdict("died", (0,), f"{text} This is rank {own.rank}, in {own}.")
