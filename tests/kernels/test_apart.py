"""A run of the whole suite may import triton before this folder: the folder then runs in a process of its own."""

import os
import subprocess
import sys

import pytest

from tests.kernels.conftest import is_interpreted
from tests.spawn import ROOT, environment

APART = "PAL_DS_KERNELS_APART"
"""Set in the process of its own."""


def test_this_folder_in_a_process_of_its_own() -> None:
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    if is_interpreted():
        pytest.skip("the tests of this folder run in this process")
    # In that process triton comes first; where it does not, it must say so and not start another.
    assert APART not in os.environ, "triton was imported before tests/kernels/conftest.py"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels"],
        cwd=ROOT,
        env=environment(**{APART: "1"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout
