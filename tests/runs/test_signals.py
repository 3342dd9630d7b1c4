"""Ctrl-C and a closed terminal, in the middle of each command: its documented code, and nothing half-written."""

import shutil
import signal
from pathlib import Path

import pytest

from pal_ds.runs.run_dir import RunDirectory
from tests.bad_input.conftest import Place
from tests.runs.test_limits import COMMANDS, names_in, words_of
from tests.warm import WarmParent

CASE = "tests.runs.signal_cases:signalled"
MOMENTS = {
    "prepare": "folder written",
    "embed": "update: encoding responses",
    "train": "update: forward",
    "evaluate": "file written",
    "adapt": "files written",
    "consolidate": "folder written",
    "score": "file written",
    "report": "files written",
}
"""Late, when most could be left behind."""
SAVES = {"embed": 75, "train": 0}
"""Commands that save what is made, and how they then end."""
KEEPS = ("new", "cache", "users/fitting")
"""What `train`, `embed` and `adapt` go on with."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("name", COMMANDS)
def test_in_the_middle(
    name: str, number: int, place: Place, warm: WarmParent, tmp_path: Path
) -> None:
    shutil.copytree(place.run, tmp_path / "run")
    before, words = names_in(tmp_path), words_of(place, tmp_path)[name]
    code, said = warm(CASE, words, MOMENTS[name], number)
    assert code == SAVES.get(name, 130), said
    assert "Traceback" not in said
    left = names_in(tmp_path) - before
    assert not [path for path in left if ".tmp" in path], left
    assert not [path for path in left if path != "users" and not path.startswith(KEEPS)], left
    if name == "train":
        run = RunDirectory(tmp_path / "new")
        status = run.status()
        assert status is not None and status["state"] == "stopped"
        assert run.complete_steps() == [status["step"]]
    if number == signal.SIGINT:
        code, said = warm(CASE, words, "", 0)
        assert code == 0, said


def test_all_commands_are_signalled() -> None:
    assert tuple(MOMENTS) == COMMANDS
