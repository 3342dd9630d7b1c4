"""A rank that ends while the ranks are still meeting; for a parent that called `warm_up`."""

import functools
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any
from unittest import mock

from pal_ds.engine.process_group import distributed
from pal_ds.errors import UserError, end_with
from tests.warm import Hook, fork_ranks, wait_for


def _meet() -> None:
    """Joins the process group; rank 0, which holds the store where they meet, ends between its two groups."""
    ends = mock.patch(
        "torch.distributed.new_group", lambda **_: os.kill(os.getpid(), signal.SIGKILL)
    )
    with ends if os.environ["RANK"] == "0" else mock.MagicMock():
        try:
            with distributed(timeout_minutes=30):
                raise AssertionError("the ranks have met")
        except UserError as error:
            end_with(error, "pal-ds")


def _meet_within(seconds: float, taken: bool = False) -> None:
    """Joins the group under a watch; the port may be another program's."""
    with socket.socket() as listener:
        if taken and os.environ["RANK"] == "0":
            listener.bind(("", int(os.environ["MASTER_PORT"])))
            listener.listen()
        try:
            with distributed(hang_minutes=seconds / 60):
                raise AssertionError("the ranks have met")
        except UserError as error:
            end_with(error, "pal-ds")


def who_does_not_come(folder: str, seconds: float) -> dict[str, dict[str, Any]]:
    """By case, the ranks' exit statuses, what they printed and how long it took, under a limit of so many seconds."""

    def stop_at_start(rank: int) -> Hook:
        def hook(number: int, moment: str) -> None:
            if (number, moment) == (rank, "start"):
                os.kill(os.getpid(), signal.SIGSTOP)

        return hook

    outcomes = {}
    for name, hook in (("0", stop_at_start(0)), ("1", stop_at_start(1)), ("port", None)):
        log, begin = Path(folder) / name, time.monotonic()
        meet = functools.partial(_meet_within, seconds, taken=name == "port")
        codes = wait_for(fork_ranks(2, meet, log, hook), seconds=50, grace=2 * seconds)
        said = [Path(f"{log}.{rank}").read_text() for rank in (0, 1)]
        outcomes[name] = {"codes": codes, "said": said, "seconds": time.monotonic() - begin}
    return outcomes


def one_ends_while_they_meet(folder: str) -> dict[str, Any]:
    """Return the ranks' exit statuses and what rank 1 printed."""
    log = Path(folder) / "meeting"
    codes = wait_for(fork_ranks(2, _meet, log), seconds=50, grace=40)
    return {"codes": codes, "said": Path(f"{log}.1").read_text()}
