"""Rank 0 of the watchdog among strangers: whatever they send, it hears its ranks and nobody else."""

import contextlib
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pal_ds.distributed.watchdog import coordinator as coordinators
from pal_ds.distributed.watchdog.coordinator import Coordinator
from pal_ds.distributed.watchdog.heartbeat import Beat, Ledger, Verdict
from pal_ds.distributed.watchdog.link import LONGEST_LINE, Link

DEEP = b"[" * (LONGEST_LINE - 1) + b"\n"


def beat(rank: int) -> Beat:
    return Beat(rank, "here", "forward", 1, 0.0, 1, 1, "file.py:1 in f", False)


class Watched:
    """A coordinator of three ranks and what it makes of them."""

    def __init__(self) -> None:
        self.verdicts: list[Verdict] = []
        self.ledger = Ledger(60.0, 1.0, Path("stacks"))
        learn = self.verdicts.append
        self.coordinator = Coordinator(3, self.ledger, 0.05, lambda: beat(0), learn)
        self.thread = threading.Thread(target=self.coordinator.run, daemon=True)
        self.thread.start()

    def connect(self, *parts: bytes) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.coordinator.port), timeout=5)
        for part in parts:
            connection.sendall(part)
        return connection

    def is_dropped(self, connection: socket.socket) -> bool:
        """Whether the coordinator ends the connection, soon, without a word."""
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False

    def hears(self, rank: int) -> bool:
        """Whether a rank can still join: it is heard and answered."""
        address, places = ("127.0.0.1", self.coordinator.port), (0.05, 60.0, Path("stacks"))
        link = Link(
            address, self.coordinator.token, *places, lambda: beat(rank), self.verdicts.append
        )
        link._socket.close()
        return link._root == beat(0)


@pytest.fixture
def watched(caplog: pytest.LogCaptureFixture) -> Iterator[Watched]:
    caplog.set_level(logging.DEBUG)
    watched = Watched()
    yield watched
    assert watched.thread.is_alive(), caplog.text
    watched.coordinator.close()
    watched.thread.join(5)
    assert "The watchdog itself failed" not in caplog.text
    assert watched.coordinator.token not in caplog.text


def hello(**message: Any) -> bytes:
    return json.dumps({"rank": 1, "beat": beat(1), **message}).encode() + b"\n"


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\nHost: here\r\nAccept: everything\r\n\r\n",
        b'{"rank": Infinity, "token": ""}' + b" " * 40 + b"\n",
        DEEP,
        b"\0" * LONGEST_LINE,
        b"f" * 32 + b"\n" + hello(),
    ],
)
def test_strangers_are_not_parsed(watched: Watched, noise: bytes) -> None:
    assert watched.is_dropped(watched.connect(noise))
    assert watched.hears(1) and not any(v.kind == "hung" for v in watched.verdicts)


@pytest.mark.parametrize(
    "message",
    [
        hello(rank=float("inf")),
        hello(rank="1"),
        hello(rank=True),
        hello(rank=0),
        hello(rank=3),
        hello(beat=None),
        b"{}\n",
        b"[]\n",
        b"{\n",
        DEEP,
        b" " * (LONGEST_LINE + 1) + b"{}\n",
    ],
)
def test_a_message_that_is_none_ends_that_connection_alone(
    watched: Watched, message: bytes
) -> None:
    assert watched.is_dropped(watched.connect(watched.coordinator.token.encode() + b"\n", message))
    assert watched.hears(2)


def test_the_token_may_come_in_pieces(watched: Watched) -> None:
    text = watched.coordinator.token.encode() + b"\n" + hello()
    connection = watched.connect()
    for place in range(len(text)):
        connection.sendall(text[place : place + 1])
        if place % 16 == 0:
            time.sleep(0.002)
    assert json.loads(connection.recv(LONGEST_LINE))["beat"][0] == 0
    connection.sendall(json.dumps({"bye": True}).encode() + b"\n")
    assert watched.is_dropped(connection)
    assert not watched.verdicts


def test_the_silent_are_dropped_in_time(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinators, "SECONDS_TO_SHOW_TOKEN", 0.3)
    connection = watched.connect(watched.coordinator.token.encode())
    assert watched.is_dropped(connection)
    assert watched.hears(1)


def test_many_strangers_shut_no_rank_out(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinators, "MOST_STRANGERS", 5)
    with contextlib.ExitStack() as held:
        crowd = [held.enter_context(watched.connect()) for _ in range(30)]
        assert watched.hears(1)
        assert watched.is_dropped(crowd[0])
        assert len(watched.coordinator._strangers) <= 3 + 5
