"""Runs a worker module on N gloo ranks under torchrun, and shows its output when it fails.

torchrun rather than the deepspeed launcher: the latter leaves files in shared memory. One launch costs seconds
(deepspeed's import), so a worker runs all cases of its test.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child: one thread per rank, no hub, this checkout importable."""
    keep = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **keep,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
        **extra,
    }


def torchrun(
    num_ranks: int, *command: object, timeout: int = 300
) -> subprocess.CompletedProcess[str]:
    """`torchrun -m COMMAND...` on a free port; the caller looks at the return code."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={num_ranks}",
        "-m",
    ]
    return subprocess.run(
        [*launcher, *map(str, command)],
        env=environment(),
        text=True,
        capture_output=True,
        timeout=timeout,
    )


def run_ranks(num_ranks: int, *command: object, timeout: int = 300) -> str:
    """As `torchrun`, asserting success; returns what was printed."""
    done = torchrun(num_ranks, *command, timeout=timeout)
    # A rank that dies takes the others with it; the error that matters is the one that is not about a lost peer.
    blame = "\n".join(
        line for line in done.stderr.splitlines() if line.startswith(("[rank", "pal-ds: error"))
    )
    assert done.returncode == 0, (
        f"{command} failed with {done.returncode}\n{blame or done.stderr[-6000:]}"
    )
    return done.stdout + done.stderr


def run_command(
    *words: object, timeout: int = 300, launcher: tuple[str, ...] = ("-m", "pal_ds")
) -> str:
    """`python -m pal_ds WORDS...` as one process, asserting success; returns what was printed."""
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, words)],
        env=environment(),
        text=True,
        capture_output=True,
        timeout=timeout,
        cwd=ROOT,
    )
    assert done.returncode == 0, f"{words} failed with {done.returncode}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr
