"""Disks that are full, read-only or closed to one rank: one message, exit code 4 on all ranks, checkpoints intact."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.warm import WarmParent


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path_factory.mktemp("disk")
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def the_message(told: dict[str, Any]) -> str:
    """The one thing that the first rank says; the second says nothing."""
    assert told["codes"] == [4, 4], told
    assert "Traceback" not in "".join(told["said"])
    lines = [line for line in told["said"][0].splitlines() if "error: " in line]
    assert len(lines) == 1, told["said"][0]
    assert "error: " not in told["said"][1]
    return lines[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_disk_full_in_a_save(warm: WarmParent, harness_folder: Path, disk: Path, rank: int) -> None:
    full, again = warm(
        "tests.engine.checkpoint.storage_cases:disk_full", harness_folder, disk, rank
    )
    message = the_message(full)
    assert "No space left on device. Make room there" in message
    assert "step_00000003.tmp" in message and "Checkpoints saved before are intact" in message
    # What had been written of the step is gone: it would take the room that the next try needs.
    assert (full["intact"], full["names"]) == ([2], ["step_00000002"])
    assert full["latest"]["step"] == 2
    assert again["codes"] == [0, 0] and "resuming from" in again["said"][0]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_cannot_write(
    warm: WarmParent, harness_folder: Path, disk: Path, rank: int
) -> None:
    """DeepSpeed's own writer would raise on this rank and leave the other in a barrier."""
    told = warm(
        "tests.engine.checkpoint.storage_cases:one_rank_refused", harness_folder, disk, rank
    )
    message = the_message(told)
    assert "File too large" in message and f"zero_pp_rank_{rank}_" in message
    assert ("rank 1: " in message) == (rank == 1)
    assert (told["intact"], told["names"]) == ([2], ["step_00000002"])


def test_metrics_cannot_be_written(warm: WarmParent, harness_folder: Path, disk: Path) -> None:
    """Rank 0 alone writes them, and the other must not wait for it."""
    message = the_message(
        warm("tests.engine.checkpoint.storage_cases:metrics_refused", harness_folder, disk)
    )
    assert "No space left on device" in message and f"{disk}/run/metrics.jsonl" in message


def test_read_only_run(warm: WarmParent, harness_folder: Path, disk: Path) -> None:
    told = warm("tests.engine.checkpoint.storage_cases:read_only", harness_folder, disk)
    message = the_message(told)
    assert "Read-only file system" in message and f"{disk}/run/" in message
    assert told["intact"][-1] < 8


def test_new_run_on_a_read_only_disk(warm: WarmParent, harness_folder: Path, disk: Path) -> None:
    told = warm("tests.engine.checkpoint.storage_cases:new_run_on_read_only", harness_folder, disk)
    assert "Read-only file system" in the_message(told)
    assert told["names"] == []
