"""A rank that ends while the ranks are still meeting; for a parent that called `warm_up`."""

import os
import signal
from pathlib import Path
from typing import Any
from unittest import mock

from pal_ds.engine.process_group import distributed
from pal_ds.errors import UserError, end_with
from tests.warm import fork_ranks, wait_for


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


def one_ends_while_they_meet(folder: str) -> dict[str, Any]:
    """Return the ranks' exit statuses and what rank 1 printed."""
    log = Path(folder) / "meeting"
    codes = wait_for(fork_ranks(2, _meet, log), seconds=50, grace=40)
    return {"codes": codes, "said": Path(f"{log}.1").read_text()}
