"""Honest things that were handed over, and a stranger who tampers with copies of them."""

import sys
import uuid
from pathlib import Path

import pytest

from pal_ds.cli.main import main
from tests.security.stranger import Stranger
from tests.warm import WarmParent


@pytest.fixture(scope="package")
def honest(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a run, its data and an export, as an honest person would hand them over."""
    folder = tmp_path_factory.mktemp("honest")
    made = warm("tests.engine.kills:train", folder, "run", {"stop_after": 2}, 1)
    assert made["codes"] == [0], made["said"]
    main(["consolidate", str(folder / "run"), str(folder / "export")])
    main(["adapt", f"--run_dir={folder / 'run'}", "--split=train", f"--out={folder / 'users'}"])
    return folder


@pytest.fixture
def stranger(honest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stranger:
    monkeypatch.chdir(tmp_path)
    # What Python's own path allows is no part of this: the folder of these tests is none of the stranger's.
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Stranger(tmp_path, f"stranger_{uuid.uuid4().hex[:8]}", honest)
