"""Every test runs on the CPU, and the shapes in signatures are checked as the code runs."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: the suite compares with CPU figures, and its two ranks would share one GPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
from jaxtyping import install_import_hook

install_import_hook(["pal_ds.heads", "pal_ds.losses", "pal_ds.users"], "beartype.beartype")

from tests.warm import WarmParent  # noqa: E402 (after the hook)


@pytest.fixture(scope="session")
def warm() -> Iterator[WarmParent]:
    """Forks ranks in a second; see `warm.py`."""
    parent = WarmParent()
    yield parent
    parent.close()


@pytest.fixture(scope="session")
def harness_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the warm parent keeps the undisturbed run that others are compared with; see `engine/kills.py`."""
    return tmp_path_factory.mktemp("harness")
