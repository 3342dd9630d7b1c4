"""Runs worker modules and commands as ranks of their own, and shows what they said when they fail.

`run_ranks` and `run_command` fork from one parent that has imported everything (`warm.py`): a new interpreter
that imports torch, DeepSpeed and transformers costs seconds of processor time for each rank. `torchrun` and
`run_process` start interpreters, for the tests of starting itself. Torchrun rather than the deepspeed launcher: the
latter leaves files in shared memory.
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


def run_ranks(num_ranks: int, module: str, *arguments: object, timeout: int = 300) -> str:
    """`python -m MODULE ARGUMENTS...` as each rank of a gloo world, asserting success; returns what they printed."""
    return _forked(num_ranks, [module, *map(str, arguments)], timeout)


def run_command(*words: object, module: str = "pal_ds", timeout: int = 300) -> str:
    """`python -m MODULE WORDS...` without a launcher, asserting success; returns what was printed."""
    return _forked(0, [module, *map(str, words)], timeout)


def outcome_of(*words: object, num_ranks: int = 0, timeout: int = 300) -> list[tuple[int, str]]:
    """Exit status and output of each rank of `python -m WORDS...`, whatever they are; 0 ranks: without a launcher."""
    from tests.warm import warm_parent  # which imports this module

    run = "tests.warm:run_module"
    return [tuple(rank) for rank in warm_parent()(run, num_ranks, [*map(str, words)], timeout)]


def _forked(num_ranks: int, words: list[str], timeout: int) -> str:
    outcome = outcome_of(*words, num_ranks=num_ranks, timeout=timeout)
    said = "\n".join(text for _, text in outcome)
    assert not any(code for code, _ in outcome), f"{words}: {outcome}\n{said}"
    return said


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


def run_process(
    *words: object, timeout: int = 300, launcher: tuple[str, ...] = ("-m", "pal_ds")
) -> str:
    """`python -m pal_ds WORDS...` in an interpreter of its own, asserting success; returns what was printed."""
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
