"""What a machine refuses ends a command with its documented code and one message, and leaves nothing half-written."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.bad_input.conftest import Place
from tests.engine.checkpoint.storage_cases import fill
from tests.warm import WarmParent

CASES = "tests.runs.limit_cases:"
COMMANDS = ("prepare", "embed", "train", "evaluate", "adapt", "consolidate", "score", "report")
HANDLES = {"prepare": 4, "embed": 12, "train": 20, "evaluate": 5, "adapt": 5, "score": 0}
MEBIBYTES = {"prepare": 2, "embed": 60, "train": 100}
"""Where ranks were not refused, gloo waited for ever at 60 and aborted the process at 100."""
STARTS_THREADS = ("embed", "train")
"""They join a process group, whose C++ threads abort or wait for ever where there is no memory for the next one."""
JOINS_RANKS = ("embed", "train", "evaluate")
HANG_MINUTES = 0.03


def words_of(place: Place, out: Path) -> dict[str, list[str]]:
    """A command of each kind that writes into `out`, where `evaluate` has its run."""
    run, texts = f"--run_dir={place.run}", place.folder / "texts.jsonl"
    frozen, export = place.folder / "frozen.yaml", place.folder / "export"
    return {
        "prepare": ["prepare", f"--config={place.recipe}", f"--data.path={out / 'data'}"],
        "embed": ["embed", f"--config={frozen}", f"--backbone.cache={out / 'cache'}"],
        "train": place.train("--train.epochs=1", run=out / "new"),
        "evaluate": ["evaluate", f"--run_dir={out / 'run'}", f"--data={place.pairs}"],
        "adapt": ["adapt", run, f"--pairs={place.pairs}", f"--out={out / 'users'}"],
        "consolidate": ["consolidate", str(place.run), str(out / "model")],
        "score": ["score", f"--model={export}", f"--input={texts}", f"--output={out / 'scores'}"],
        "report": ["report", f"--run_dirs={place.run}", f"--out={out / 'report'}"],
    }


@contextlib.contextmanager
def mounted(disk: Path) -> Iterator[None]:
    """A small file system of its own at `disk`."""
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("only root may mount a file system")
    try:
        yield
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def check(name: str, code: int, said: str, left: set[str]) -> None:
    assert code == 4, f"{name}: {code}\n{said}"
    assert "Traceback" not in said and said.count("pal-ds: error: ") == 1, f"{name}\n{said}"
    # A cache says what it is of before it holds anything; data may be whole before they cannot be opened.
    allowed = ("cache",) if "data/dataset.json" not in left else ("cache", "data")
    assert not [path for path in left if not path.startswith(allowed)], f"{name}: {left}"
    assert not [path for path in left if ".tmp" in path or path.endswith(".safetensors")], left


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("full", "No space left on device"),
        ("inodes", "No space left on device"),
        ("read-only", "Read-only file system"),
    ],
)
def test_a_disk_that_takes_nothing(
    kind: str, reason: str, place: Place, warm: WarmParent, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with mounted(disk):
        shutil.copytree(place.run, disk / "run")
        options = {"read-only": "ro", "inodes": f"nr_inodes={len(names_in(disk)) + 1}"}
        if kind == "full":
            fill(disk, 0)
        else:
            subprocess.run(["mount", "-o", f"remount,{options[kind]}", str(disk)], check=True)
        for name, words in words_of(place, disk).items():
            before = names_in(disk)
            code, said = warm(CASES + "under_limit", words, "", 0)
            check(name, code, said, names_in(disk) - before)
            (message,) = [line for line in said.splitlines() if "error: " in line]
            assert f"error: {disk}/" in message and reason in message, f"{name}: {message}"


@pytest.mark.parametrize(
    ("limit", "spares", "usual", "reason"),
    [
        ("handles", HANDLES, 3, "Too many open files"),
        ("memory", MEBIBYTES, 8, "Cannot allocate memory"),
    ],
)
def test_a_process_that_gets_too_little(
    limit: str,
    spares: dict[str, int],
    usual: int,
    reason: str,
    place: Place,
    warm: WarmParent,
    tmp_path: Path,
) -> None:
    shutil.copytree(place.run, tmp_path / "run")
    for name, words in words_of(place, tmp_path).items():
        before = names_in(tmp_path)
        code, said = warm(CASES + "under_limit", words, limit, spares.get(name, usual))
        check(name, code, said, names_in(tmp_path) - before)
        assert reason in said, f"{name}\n{said}"
        if limit == "memory" and name in STARTS_THREADS:
            assert "error: address space: this process needs" in said, f"{name}\n{said}"


def words_of_ranks(name: str, place: Place, out: Path) -> list[str]:
    """A command whose ranks soon give up: `evaluate` by the limit of its run, in a copy."""
    words = words_of(place, out)[name]
    if name != "evaluate":
        return [*words, f"--train.hang_minutes={HANG_MINUTES}"]
    run = Path(shutil.copytree(place.run, out / "run"))
    recipe = yaml.safe_load((run / "config.yaml").read_text())
    recipe["train"]["hang_minutes"] = HANG_MINUTES
    (run / "config.yaml").write_text(yaml.safe_dump(recipe))
    return words


@pytest.mark.parametrize("name", JOINS_RANKS)
def test_a_rank_that_is_missing(name: str, place: Place, warm: WarmParent, tmp_path: Path) -> None:
    words = words_of_ranks(name, place, tmp_path)
    before = names_in(tmp_path)
    (code, said), (stopped, _) = warm(CASES + "without_a_rank", words)
    assert (code, stopped) == (5, -9), said
    assert said.count("error: rank 1 has not come within 1.8 seconds") == 1, said
    assert "Traceback" not in said and names_in(tmp_path) == before


def test_a_rank_that_comes_late_hears_who_died(
    place: Place, warm: WarmParent, tmp_path: Path
) -> None:
    """Rank 0 stays for it: it would look for a rank 0 that has left until the limit."""
    words = [*words_of(place, tmp_path)["train"], "--train.hang_minutes=0.5"]
    (first, said), (late, seen), (died, _) = warm(CASES + "come_late", words)
    assert (first, late, died) == (5, 5, -9), f"{said}\n{seen}"
    assert said.count("rank 2 on ") == 1 and "died without a word" in said
    assert "could not meet" not in seen and "Traceback" not in said + seen, seen


@pytest.mark.parametrize("name", JOINS_RANKS)
def test_a_port_that_is_taken(name: str, place: Place, warm: WarmParent, tmp_path: Path) -> None:
    words = words_of_ranks(name, place, tmp_path)
    before = names_in(tmp_path)
    (first, said), (second, seen) = warm(CASES + "on_a_port_that_is_taken", words, 2)
    assert (first, second) == (2, 5), f"{said}\n{seen}"
    assert said.count("error: MASTER_PORT") == 1 and "another program listens there" in said
    assert re.search(r"cannot meet at 127\.0\.0\.1:\d+\. Set another port", said), said
    assert seen.count("the ranks could not meet at 127.0.0.1:") == 1
    assert "Traceback" not in said + seen and names_in(tmp_path) == before


@pytest.mark.parametrize("name", JOINS_RANKS)
def test_a_port_that_is_taken_before_a_launcher_starts_one_rank(
    name: str, place: Place, warm: WarmParent, tmp_path: Path
) -> None:
    words = words_of_ranks(name, place, tmp_path)
    before = names_in(tmp_path)
    ((code, said),) = warm(CASES + "on_a_port_that_is_taken", words, 1)
    assert code == 2 and said.count("error: MASTER_PORT") == 1, said
    assert "Traceback" not in said and names_in(tmp_path) == before


def test_all_commands_are_tried(place: Place) -> None:
    assert tuple(words_of(place, Path("out"))) == COMMANDS
