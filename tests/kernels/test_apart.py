"""A run of the whole suite may import triton before this folder: the folder then runs in a process of its own."""

import subprocess
import sys

import pytest

from tests.kernels.conftest import is_interpreted
from tests.spawn import ROOT, environment


def test_this_folder_in_a_process_of_its_own() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    if is_interpreted():
        pytest.skip("the tests of this folder run in this process")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
