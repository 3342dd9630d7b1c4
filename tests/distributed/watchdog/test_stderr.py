"""What a watchdog says is seen while the process's stderr leads elsewhere, as DeepSpeed's import makes it do."""

import os

import pytest
import torch

from pal_ds.distributed.watchdog.heartbeat import Verdict
from pal_ds.distributed.watchdog.watcher import Watcher
from pal_ds.distributed.world import World


def test_a_verdict_is_seen_while_stderr_leads_elsewhere(capfd: pytest.CaptureFixture[str]) -> None:
    watcher = Watcher(World(1, 2, torch.device("cpu")), hang_seconds=60)
    kept, elsewhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(elsewhere, 2)
    try:
        watcher._say(Verdict("died", (0,), "rank 0 is gone"))
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(elsewhere)
        watcher.close()
    assert capfd.readouterr().err == "pal-ds: error: rank 0 is gone\n"
