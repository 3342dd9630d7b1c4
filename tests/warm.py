"""Ranks forked from a parent that has imported everything: a start of two ranks costs a second instead of six.

The parent stays single-threaded and in no process group, so that its children may do both. It also loads DeepSpeed's
compiled operators: a process that is killed while it loads them leaves a lock that stops every later start.
"""

import contextlib
import functools
import gc
import importlib
import json
import mmap
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pal_ds.distributed import phase
from pal_ds.io import fault_points
from tests.spawn import ROOT, environment

KILLED = -signal.SIGKILL
LAUNCHER_VARIABLES = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
LATE_IMPORTS = (
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.comm.mori",
    "docstring_parser",
    "pal_ds.backbones.transformer",
    "pal_ds.compare.suite",
    "peft",
    "pyarrow.pandas_compat",
    "setuptools",
    "torch._dynamo",
    "torch.utils.serialization.config",
    "transformers.generation.utils",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
    "transformers.processing_utils",
)
"""What each rank would else import for itself."""
_MOMENT_BYTES = 64

Hook = Callable[[int, str], None]
"""Called in a rank with its number and each moment that it reaches."""


def keep_recipe_parser() -> None:
    """One parser of recipes for all tests of this process: each is built of every class that a recipe may name.

    A parser keeps nothing of what it has read. `restore` builds one each time, and the suite calls it by the hundred.
    """
    from pal_ds.config import recipe

    recipe.recipe_parser = functools.cache(recipe.recipe_parser)


def warm_up() -> None:
    """Imports and loads what a training needs, once; the process that calls it may fork ranks."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # What DeepSpeed and pyarrow would import at their first use takes seconds, too.
    import cpuinfo
    import deepspeed
    import deepspeed.runtime.zero.muon.muon_optimizer
    import pandas  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import pal_ds.cli.evaluation_commands
    import pal_ds.cli.export_commands
    import pal_ds.cli.main
    import pal_ds.cli.training_commands
    import pal_ds.config.recipe
    import pal_ds.engine.checkpoint.forget
    import pal_ds.export
    import pal_ds.training.launch
    import pal_ds.training.loop

    for name in LATE_IMPORTS:
        importlib.import_module(name)
    # DeepSpeed's CPU Adam asks for the processor's maker, in a process of its own, each time.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    cpuinfo.get_cpu_info()
    keep_recipe_parser()
    pal_ds.config.recipe.recipe_parser()
    torch.set_num_threads(1)
    # Else every child's first collection copies the pages of all that was imported.
    gc.freeze()
    accelerator = deepspeed.accelerator.get_accelerator()
    accelerator.create_op_builder("ShareMemCommBuilder").load()
    assert threading.active_count() == 1, "a fork would copy one thread of several"


@dataclass
class Rank:
    """A forked rank and what the parent knows of it."""

    number: int
    pid: int
    _moment: mmap.mmap
    code: int | None = None
    """Exit status; negative for a signal."""

    @property
    def moment(self) -> str:
        """The last moment that it has reached."""
        return self._moment[:].rstrip(b"\0").decode()

    def kill(self) -> None:
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code


def fork_ranks(
    num_ranks: int, work: Callable[[], None], log: Path, hook: Hook | None = None
) -> list[Rank]:
    """Runs `work` in children that a launcher's variables make ranks; what they print goes to `log`.N."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for number in range(num_ranks):
        moment = mmap.mmap(-1, _MOMENT_BYTES)
        pid = os.fork()
        if pid == 0:
            _live_as_rank(number, num_ranks, port, work, log, moment, hook)
        ranks.append(Rank(number, pid, moment))
    return ranks


def _live_as_rank(
    number: int,
    num_ranks: int,
    port: int,
    work: Callable[[], None],
    log: Path,
    moment: mmap.mmap,
    hook: Hook | None,
) -> None:
    """Never returns: whatever happens in a child, the parent's test must not go on in it."""
    code = 1
    try:
        stream = os.open(f"{log}.{number}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
        # A forked torch makes its thread pool anew at the next call that sizes it, and two threads at once (the loop's
        # and autograd's) would find none: "Invalid thread pool!". Here there is one.
        import torch

        torch.set_num_threads(1)
        values = (number, number, num_ranks, num_ranks, "127.0.0.1", port)
        os.environ.update(zip(LAUNCHER_VARIABLES, map(str, values), strict=True))
        # A job's time limit counts from the start of its process.
        phase.STARTED = time.monotonic()

        def reached(name: str) -> None:
            moment[:] = name.encode().ljust(_MOMENT_BYTES, b"\0")
            if hook is not None:
                hook(number, name)

        # Phases are moments, too: they say where in an update a rank was.
        enter = phase.enter

        def entered(name: str, step: int | None = None, **options: float) -> None:
            enter(name, step, **options)
            reached(f"update: {name}")

        phase.enter = entered
        fault_points.on_reaching(reached)
        reached("start")
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait_for(ranks: list[Rank], *, seconds: float = 60, grace: float = 4) -> list[int]:
    """Exit statuses. When one rank has failed the others get `grace` seconds, then are killed, as launchers do.

    Raises:
        TimeoutError: all were still at work after `seconds`; they are killed.
    """
    deadline, failed_at = time.monotonic() + seconds, None
    # Each of them is asked: the first may be stopped for ever.
    while None in [rank.poll() for rank in ranks]:
        now = time.monotonic()
        if failed_at is None and any(rank.code for rank in ranks):
            failed_at = now
        if now > deadline or (failed_at is not None and now > failed_at + grace):
            for rank in ranks:
                rank.kill()
            if failed_at is None:
                raise TimeoutError(f"after {seconds} s at {[rank.moment for rank in ranks]}")
        time.sleep(0.005)
    return [rank.code for rank in ranks if rank.code is not None]


def kill_at(rank: int, moment: str, occurrence: int = 1) -> Hook:
    """A hook that kills `rank` when it reaches `moment` for the n-th time."""
    counts = iter(range(1, sys.maxsize))

    def hook(number: int, name: str) -> None:
        if number == rank and name == moment and next(counts) == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def run_module(num_ranks: int, words: list[str], seconds: float) -> list[tuple[int, str]]:
    """`python -m WORDS...` as each of so many ranks, or as one process that no launcher started where that is 0.

    Returns exit status and output of each.
    """

    def work() -> None:
        if num_ranks == 0:
            for name in LAUNCHER_VARIABLES:
                os.environ.pop(name)
        sys.argv = list(words)
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        ranks = fork_ranks(max(num_ranks, 1), work, log)
        codes = wait_for(ranks, seconds=seconds, grace=30)
        said = [Path(f"{log}.{rank.number}").read_text() for rank in ranks]
    return list(zip(codes, said, strict=True))


class WarmParent:
    """A process that is warmed up, for tests: it calls functions by name, and they may fork ranks from it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(),
            cwd=ROOT,
            text=True,
        )

    def __call__(self, function: str, *arguments: object) -> Any:
        """The value of `function` ("module:name") over there; arguments and value go as JSON."""
        assert self._process.stdin is not None and self._process.stdout is not None
        given = [str(a) if isinstance(a, Path) else a for a in arguments]
        self._process.stdin.write(json.dumps([function, given]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        assert answer["failure"] is None, answer["failure"]
        return answer["value"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=20)


@functools.cache
def warm_parent() -> WarmParent:
    """The one of this session, which `conftest.py` closes at its end."""
    return WarmParent()


def serve() -> None:
    """The warmed-up side of WarmParent."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warm_up()
    for line in sys.stdin:
        (module, _, name), arguments = (part := json.loads(line))[0].partition(":"), part[1]
        answer: dict[str, Any] = {"value": None, "failure": None}
        try:
            answer["value"] = getattr(importlib.import_module(module), name)(*arguments)
        except Exception:
            answer["failure"] = traceback.format_exc()
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
