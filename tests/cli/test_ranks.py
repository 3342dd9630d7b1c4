"""RANK in the environment of a command: who speaks, and what a launcher may leave out."""

import subprocess
import sys
from pathlib import Path

import pytest

from pal_ds.cli.main import main
from pal_ds.engine.process_group import _fill_rank_variables
from pal_ds.errors import LauncherError
from tests.spawn import ROOT, environment


@pytest.mark.parametrize(
    "words",
    [
        ("score", "--model=nowhere", "--input=nothing.jsonl"),
        ("consolidate", "nowhere", "out"),
        ("users", "--run_dir=nowhere", "--list"),
        ("report", "--run_dirs=[nowhere]", "--out=out"),
    ],
    ids=lambda words: words[0],
)
def test_a_command_of_one_process_speaks_whatever_rank_it_is(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("pal-ds: error: ")


def test_ranks_that_say_the_same_leave_the_word_to_rank_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        main(["embed", "--config=quickstart_pal_a", f"--data.path={tmp_path}"])
    assert stop.value.code == 2 and not capsys.readouterr().err


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    values = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return monkeypatch


def test_a_container_with_one_rank_has_no_local_rank(launched: pytest.MonkeyPatch) -> None:
    import os

    assert _fill_rank_variables() == []
    assert os.environ["LOCAL_RANK"] == "0"
    launched.delenv("LOCAL_RANK")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_rank_that_cannot_meet_says_so(launched: pytest.MonkeyPatch, name: str) -> None:
    launched.delenv(name)
    with pytest.raises(LauncherError, match=f"RANK is 1 in the environment, and {name} are not"):
        _fill_rank_variables()


def test_a_training_with_a_stray_rank_is_told(tmp_path: Path) -> None:
    """Nobody else is there to say it."""
    recipe = ["--config=quickstart", "--head=PalA", f"--data.path={tmp_path / 'none'}"]
    done = subprocess.run(
        [sys.executable, "-m", "pal_ds", "train", *recipe, f"--run_dir={tmp_path / 'run'}"],
        env=environment() | {"RANK": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2 and "unset RANK for a single process" in done.stderr
