"""Folders are whole or absent, and what killed writers left goes."""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from pal_ds.errors import UserError
from pal_ds.io.files import clear_aside, everything_under, new_files, new_folder


def left_by(pid: int, out: Path) -> Path:
    """Half a folder that a process of this number left on this machine."""
    folder = out.with_name(f"{out.name}.tmp-{socket.gethostname()}-{pid}")
    folder.mkdir()
    (folder / "half").touch()
    return folder


def test_a_folder_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("x")
        assert not out.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "file").read_text() == "x"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no"), new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        raise ValueError("no")
    assert not list(tmp_path.iterdir())


def test_what_killed_writers_left_goes_and_what_others_write_stays(tmp_path: Path) -> None:
    """One of our own number, too: in a container a process and its successor often have the same."""
    out = tmp_path / "out"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [left_by(dead.pid, out), left_by(os.getpid(), out)]
    running = left_by(os.getppid(), out)
    with new_folder(out):
        pass
    assert not any((folder / "half").exists() for folder in gone)
    assert (running / "half").is_file() and not list(out.iterdir())


def test_files_join_a_folder_together_or_not_at_all(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for fails in (True, False):
        with contextlib.suppress(ValueError), new_files(out) as folder:
            (folder / "b").touch()
            (folder / "a").touch()
            if fails:
                raise ValueError
        assert out.exists() != fails
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "out"]


def test_what_a_killed_replacement_moved_away_is_put_back(tmp_path: Path) -> None:
    for name in ("out.tmp-old-3", "out.tmp-new-3", "out.tmp-new-3.tmp-host-3", "out.tmp-host-9"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    (tmp_path / "other.tmp-host-9").mkdir()
    clear_aside(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir() if path.name[:3] == "out"] == ["out"]
    assert (tmp_path / "out" / "out.tmp-old-3").is_file()
    assert (tmp_path / "other.tmp-host-9").is_dir()


def test_of_two_writers_of_one_folder_the_second_is_refused_in_words(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="exists and is not empty"), new_folder(out):
        out.mkdir()
        (out / "of the first").touch()
    assert [path.name for path in out.iterdir()] == ["of the first"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_is_no_folder_of_files(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="out: is a file"), new_files(tmp_path / "out"):
        pass


def test_a_walk_passes_over_what_goes_meanwhile(tmp_path: Path) -> None:
    # Another process's folder beside its final name: there when its parent was listed, gone when it is entered.
    for name in ("goes", "stays"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    seen = []
    for path in everything_under(tmp_path):
        seen.append(path.relative_to(tmp_path).as_posix())
        if path.name == "stays":
            shutil.rmtree(tmp_path / "goes")
    assert seen == [".", "goes", "stays", "stays/file"]


def test_a_walk_names_what_it_may_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(PermissionError, match="denied"):
        list(everything_under(tmp_path))
