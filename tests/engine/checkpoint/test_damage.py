"""Every file of a checkpoint cut, deleted, changed or joined by another: found, named, and the step before is used."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pal_ds.engine.checkpoint.manifest import read_manifest
from pal_ds.engine.checkpoint.retention import discard_leftovers, retain
from pal_ds.engine.checkpoint.verify import verify_checkpoint
from pal_ds.errors import UserError
from pal_ds.io.files import write_json
from pal_ds.runs.run_dir import RunDirectory
from tests.engine.newest import newest_intact
from tests.same_run import assert_same_step
from tests.warm import WarmParent


@pytest.fixture(scope="module")
def folder(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a run of two ranks with three checkpoints."""
    folder = tmp_path_factory.mktemp("damage")
    settings = {"save_every": 1, "stop_after": 3, "keep_checkpoints": 3, "eval_every": 3}
    made = warm("tests.engine.kills:train", folder, "run", settings)
    assert made["codes"] == [0, 0], made["said"]
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> RunDirectory:
    """A copy, to be damaged."""
    shutil.copytree(folder / "run", tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def test_the_run_has_what_these_tests_damage(run: RunDirectory) -> None:
    assert run.complete_steps() == [1, 2, 3]
    names = sorted(verify_checkpoint(run.checkpoint(3))["files"])
    assert [name.rpartition("_")[2] for name in names] == [
        *["states.pt"] * 4,
        "users.arrow",
        "users.safetensors",
    ]


def cut(path: Path) -> None:
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size // 2)


def cut_by_one(path: Path) -> None:
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with open(path, "ab") as stream:
        stream.write(b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path, position: int, mask: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= mask
    path.write_bytes(content)


def flip_first(path: Path) -> None:
    flip(path, 0)


def flip_middle(path: Path) -> None:
    flip(path, path.stat().st_size // 2)


def flip_last(path: Path) -> None:
    flip(path, -1)


def flip_some(path: Path) -> None:
    generator = random.Random(path.name)
    flip(path, generator.randrange(path.stat().st_size), 1 << generator.randrange(8))


DAMAGES: list[Callable[[Path], None]] = [
    *(Path.unlink, empty, cut, cut_by_one, lengthen),
    *(flip_first, flip_middle, flip_last, flip_some),
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_every_file(
    run: RunDirectory, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    newest = run.checkpoint(3)
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(files) == 7
    for file in files:
        kept = file.read_bytes()
        damage(file)
        caplog.clear()
        found = newest_intact(run)
        assert found is not None and found[0] == run.checkpoint(2), file
        named = newest if damage is Path.unlink and file.name == "manifest.json" else file
        assert [str(named) in record.message for record in caplog.records] == [True], file
        assert caplog.records[0].levelno == logging.WARNING
        file.write_bytes(kept)
    found = newest_intact(run)
    assert found is not None and found[0] == newest


def test_any_byte_of_the_manifest(run: RunDirectory) -> None:
    """Also those that leave valid JSON: a digit of the step, white space, a letter of a key that is not read."""
    file = run.checkpoint(3) / "manifest.json"
    content = file.read_bytes()
    generator = random.Random(0)
    for position in range(len(content)):
        flipped = content[position] ^ 1 << generator.randrange(8)
        changed = generator.choice([flipped, *(set(b" 0\n") - {content[position]})])
        file.write_bytes(content[:position] + bytes([changed]) + content[position + 1 :])
        with pytest.raises(UserError, match=r"manifest\.json"):
            read_manifest(run.checkpoint(3))


def test_a_file_of_another_step(run: RunDirectory) -> None:
    """Whole in itself, often of the same size: only the hash tells."""
    for name in verify_checkpoint(run.checkpoint(3))["files"]:
        if name == "users.arrow":
            continue  # ids and rows, the same in every step
        kept = (run.checkpoint(3) / name).read_bytes()
        shutil.copy(run.checkpoint(2) / name, run.checkpoint(3) / name)
        with pytest.raises(UserError, match=name):
            verify_checkpoint(run.checkpoint(3))
        (run.checkpoint(3) / name).write_bytes(kept)


def test_a_manifest_of_another_step(run: RunDirectory) -> None:
    shutil.rmtree(run.checkpoint(3))
    shutil.copytree(run.checkpoint(2), run.checkpoint(3))
    with pytest.raises(UserError, match="of step 2, in a directory of step 3"):
        verify_checkpoint(run.checkpoint(3))


@pytest.mark.parametrize(
    "name", ["engine/zero_pp_rank_2_mp_rank_00_optim_states.pt", "notes.txt", "engine/a/b.pt"]
)
def test_a_file_too_many(run: RunDirectory, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """DeepSpeed finds some of its files by pattern."""
    added = run.checkpoint(3) / name
    added.parent.mkdir(exist_ok=True)
    added.write_bytes(b"?")
    found = newest_intact(run)
    assert found is not None and found[0] == run.checkpoint(2)
    assert f"{added}: is not named in the manifest" in caplog.text


def test_files_of_the_file_system_are_ignored(run: RunDirectory) -> None:
    (run.checkpoint(3) / "engine" / ".nfs0001").write_bytes(b"?")
    assert verify_checkpoint(run.checkpoint(3))["step"] == 3


def test_nothing_intact_is_no_fresh_start(run: RunDirectory) -> None:
    for step in run.complete_steps():
        (run.checkpoint(step) / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"none of the steps \[1, 2, 3\] is intact"):
        newest_intact(run)


def test_a_step_saved_again_replaces_the_damaged_one(
    warm: WarmParent, folder: Path, run: RunDirectory
) -> None:
    """Resumes from the step before, says which one was damaged, and ends with an intact one."""
    flip_middle(run.checkpoint(3) / "users.safetensors")
    shutil.copytree(run.path, folder / "again")
    told = warm(
        "tests.engine.kills:train",
        folder,
        "again",
        {"save_every": 1, "stop_after": 3, "keep_checkpoints": 3, "eval_every": 3},
    )
    assert told["codes"] == [0, 0], told["said"]
    assert "step_00000003/users.safetensors" in told["said"][0].replace("\n", "")
    assert "resuming from" in told["said"][0]
    again = RunDirectory(folder / "again")
    assert assert_same_step(RunDirectory(folder / "run").checkpoint(3), again.checkpoint(3))
    assert sorted(p.name for p in again.checkpoints.iterdir()) == [
        f"step_{step:08d}" for step in (1, 2, 3)
    ]


def test_a_step_that_is_gone_is_missed(run: RunDirectory, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever asks for the newest hears that it is not what latest.json names."""
    assert run.resolve_step("latest") == 3
    assert not caplog.messages
    (run.checkpoint(3) / "manifest.json").unlink()
    assert run.resolve_step("latest") == 2
    (message,) = caplog.messages
    assert "latest.json names step 3" in message
    assert "taking step 2" in message


def test_an_interrupted_replacement_is_taken_back(run: RunDirectory) -> None:
    """Killed between two renames: the old step, intact or not, has its name again, and the new one is made again."""
    path = run.checkpoint(3)
    path.rename(path.with_name(path.name + ".replaced"))
    shutil.copytree(run.checkpoint(2), path.with_name(path.name + ".tmp"))
    found = newest_intact(run)
    assert found is not None and found[0] == path
    discard_leftovers(run)
    assert run.complete_steps() == [1, 2, 3]
    assert len(list(run.checkpoints.iterdir())) == 3


def test_retention(run: RunDirectory) -> None:
    for name in ("step_00000002.tmp", "step_00000004.gone", "step_00000003_of_mine", "notes"):
        shutil.copytree(run.checkpoint(2), run.checkpoints / name)
    retain(run, 2, 1, now=3)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        *("notes", "step_00000001", "step_00000002", "step_00000003", "step_00000003_of_mine"),
    ]
    retain(run, 2, None, now=3)
    assert run.complete_steps() == [2, 3]


def test_retention_keeps_what_latest_names(run: RunDirectory) -> None:
    """Steps 2 and 3 were damaged, so the run went on from 1: they must not push out the only intact ones."""
    write_json(run.path / "latest.json", {"step": 1})
    retain(run, 2, None, now=1)
    assert run.complete_steps() == [1]


def test_retention_keeps_where_the_run_stands(run: RunDirectory) -> None:
    """Killed before latest.json was written, the run resumed from a step that is newer."""
    write_json(run.path / "latest.json", {"step": 1})
    retain(run, 1, None, now=3)
    assert run.complete_steps() == [1, 3]


def test_retention_survives_a_damaged_pointer(run: RunDirectory) -> None:
    (run.path / "latest.json").write_text("{")
    retain(run, 2, None, now=3)
    assert run.complete_steps() == [2, 3]


def test_retention_survives_a_best_step_that_is_gone(run: RunDirectory) -> None:
    """best.json is of a step that was damaged and deleted by hand, or that was never published."""
    write_json(run.path / "best.json", {"step": 77})
    retain(run, 2, 77, now=3)
    assert run.complete_steps() == [2, 3]
    (run.path / "best.json").write_text("{")
    retain(run, 1, 77, now=3)
    assert run.complete_steps() == [3]


def test_an_incomplete_step_does_not_count_as_kept(run: RunDirectory) -> None:
    (run.checkpoint(2) / "manifest.json").unlink()
    retain(run, 2, None, now=3)
    assert run.all_steps() == [1, 3]


def test_a_failed_deletion_is_told_once_and_tried_again(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("pal_ds.engine.checkpoint.retention.shutil.rmtree", refuse)
        for _ in range(2):
            retain(run, 1, None, now=3)
    # No half-deleted directory is taken for a checkpoint, whatever was left of it.
    assert run.all_steps() == [3]
    assert caplog.text.count("cannot be deleted") == 2, caplog.text
    retain(run, 1, None, now=3)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step_00000003"]


def test_damage_of_pointers_is_named(run: RunDirectory) -> None:
    for text in (
        "{",
        "[]",
        '{"step": "../../x"}',
        '{"step": true}',
        '{"path": "x"}',
        '{"step": -1}',
    ):
        (run.path / "best.json").write_text(text)
        with pytest.raises(UserError, match=r"best\.json"):
            run.resolve_step("best")
    (run.path / "best.json").write_text(json.dumps({"step": 77}))
    with pytest.raises(UserError, match="77"):
        run.resolve_step("best")
