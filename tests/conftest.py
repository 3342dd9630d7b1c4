"""Every test runs on the CPU, and the shapes in signatures are checked as the code runs."""

import logging
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: the suite compares with CPU figures, and its two ranks would share one GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Small tensors: a second thread of OpenMP's spends as much again on waiting. Whoever names a number gets it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts what it puts in the background deaf to Ctrl-C, and nohup to a closed terminal; children inherit it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
from jaxtyping import install_import_hook

install_import_hook(["pal_ds.heads", "pal_ds.losses", "pal_ds.users"], "beartype.beartype")

# Marks of exported folders that were found to be sound go here, not to the home of whoever runs the suite.
os.environ.setdefault("PAL_DS_CACHE", tempfile.mkdtemp(prefix="pal_ds_marks_"))

from tests.tiny_run import TinyRun, make_tiny_run  # noqa: E402
from tests.warm import WarmParent, keep_recipe_parser, warm_parent  # noqa: E402 (after the hook)

keep_recipe_parser()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Sends whole files to workers (`pytest -n`), since tests of a file share fixtures; those of SLURM all to one."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            # They share a cluster, of which a machine has one.
            return "tests/slurm" if nodeid.startswith("tests/slurm/") else nodeid.split("::")[0]

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def _log_as_rank_zero() -> None:
    """Gives each test our logger as rank 0 has it: a command run as another rank leaves its level in the process."""
    logging.getLogger("pal_ds").setLevel(logging.INFO)


@pytest.fixture(scope="session", autouse=True)
def _close_warm_parent() -> Iterator[None]:
    """Of the helpers in `spawn.py`, too, which start it at their first use."""
    yield
    if warm_parent.cache_info().currsize:
        warm_parent().close()


@pytest.fixture(scope="session")
def warm() -> WarmParent:
    """Forks ranks in a second; see `warm.py`."""
    return warm_parent()


@pytest.fixture(scope="session")
def harness_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the warm parent keeps the undisturbed run that others are compared with; see `engine/kills.py`."""
    return tmp_path_factory.mktemp("harness")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Computes as a forked rank does, on one thread.

    Figures of two processes are the same bits on one machine, at one world size and with as many threads in each: a
    sum that is split among threads is taken in another order.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """A tiny backbone and prepared pairs that many tests share; see `tiny_run.py`."""
    return make_tiny_run(tmp_path_factory.mktemp("tiny_run"))
