"""Which checkpoint a start takes: the same for all ranks as for one, and never past one of another format."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint import checkpoint, verify
from pal_ds.engine.checkpoint.forget import recover
from pal_ds.engine.checkpoint.manifest import FORMAT_VERSION, FormatError, read_manifest
from pal_ds.engine.checkpoint.verify import verify_checkpoint, wait_for_files
from pal_ds.errors import StorageError, UserError
from pal_ds.io.sealed import share_of
from pal_ds.runs.run_dir import RunDirectory
from tests.engine.newest import newest_intact
from tests.engine.steps import make_step, of_format
from tests.warm import WarmParent


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    for step in (1, 2, 3):
        make_step(run, step)
    return run


@pytest.mark.parametrize(
    ("version", "whose", "remedy"),
    [(1, "an older version", "Go on with that version"), (99, "a newer version", "Update pal_ds")],
)
@pytest.mark.parametrize("steps", [(3,), (2, 3), (1, 2, 3)])
def test_another_format_is_no_damage(
    run: RunDirectory, steps: tuple[int, ...], version: int, whose: str, remedy: str
) -> None:
    """Falling back would go on from an older step, and the next save would delete the newer ones."""
    for step in steps:
        of_format(run.checkpoint(step), version)
    with pytest.raises(FormatError) as refused:
        newest_intact(run)
    for part in (f"{run.checkpoint(3)}/manifest.json: of format {version}", whose, remedy):
        assert part in str(refused.value)
    assert f"reads format {FORMAT_VERSION}" in str(refused.value)


def test_an_older_step_of_another_format_is_not_looked_at(run: RunDirectory) -> None:
    of_format(run.checkpoint(1), 1)
    found = newest_intact(run)
    assert found is not None and found[0] == run.checkpoint(3)


@pytest.mark.parametrize("version", ["3", "0", "null", "true", '"2"', "2.0"])
def test_a_damaged_version_is_damage(run: RunDirectory, version: str) -> None:
    """One bit of the number flipped: the rest still matches the checksum, so no other version wrote it."""
    file = run.checkpoint(3) / "manifest.json"
    text = file.read_text()
    file.write_text(
        text.replace(f'"format_version": {FORMAT_VERSION}', f'"format_version": {version}')
    )
    assert file.read_text() != text
    with pytest.raises(UserError, match="damaged") as refused:
        read_manifest(run.checkpoint(3))
    assert not isinstance(refused.value, FormatError)
    found = newest_intact(run)
    assert found is not None and found[0] == run.checkpoint(2)


@pytest.mark.parametrize("version", [1, 99])
def test_no_copy_of_another_format_is_deleted(run: RunDirectory, version: int) -> None:
    """A removal of a user that another version was interrupted in."""
    step = run.checkpoint(3)
    edited, old = (step.with_name(prefix + step.name) for prefix in ("edited-", "old-"))
    shutil.copytree(step, edited)
    step.rename(old)
    for path in (edited, old):
        of_format(path, version)
    with pytest.raises(FormatError):
        recover(run)
    assert edited.is_dir() and old.is_dir()


@pytest.fixture(scope="module")
def found(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return warm(
        "tests.engine.checkpoint.verify_cases:together", tmp_path_factory.mktemp("together")
    )


def test_all_ranks_decide_as_one_process(found: list[dict[str, Any]]) -> None:
    one, other = (rank["seen"] for rank in found)
    assert one.keys() == other.keys() and len(one) > 15
    kinds = set()
    for name, (alone, together) in one.items():
        assert together == alone, name
        assert other[name][1] == together, name
        kinds.add(together[0].rpartition("/")[2])
    assert kinds == {
        *("step_00000001", "step_00000002", "step_00000003", "UserError", "FormatError"),
        *("UntrustedCheckpointError", "ForeignObjectError"),
    }


def test_each_file_is_read_by_one_rank(found: list[dict[str, Any]]) -> None:
    parts = [rank["read"] for rank in found]
    assert sorted(name for part in parts for name in part) == sorted(
        ["a_model_states.pt", "b_model_states.pt", "c_optim_states.pt", "users.arrow"]
    )
    assert all(parts)


def test_a_node_that_does_not_see_the_files_is_no_damage(found: list[dict[str, Any]]) -> None:
    for rank in found:
        kind, message, said = rank["unseen"]
        assert (kind, said) == ("StorageError", [])
        assert message.startswith("rank 1: ") and message.endswith("step_00000003: not seen")


sizes = st.lists(st.integers(0, 1000), max_size=30)


@given(sizes, st.integers(1, 8))
def test_shares(sizes: list[int], world_size: int) -> None:
    files = {f"f{number}": {"size": size} for number, size in enumerate(sizes)}
    shares = [share_of(files, rank, world_size) for rank in range(world_size)]
    # Every file once, under its place; each rank in the order of the manifest.
    assert sorted(place for share in shares for place in share) == list(range(len(files)))
    for share in shares:
        assert list(share) == sorted(share)
        assert all(list(files)[place] == name for place, (name, _) in share.items())
    loads = [sum(entry["size"] for _, entry in share.values()) for share in shares]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_files_that_never_appear(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "SECONDS_TO_APPEAR", 0.1)
    files = verify_checkpoint(run.checkpoint(3))["files"]
    wait_for_files(run.checkpoint(3), files)
    with pytest.raises(StorageError, match="a file system that all nodes share"):
        wait_for_files(run.checkpoint(3), {**files, "engine/d.pt": {"size": 1}})


def test_a_file_system_without_chmod(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for only where there is something to change."""
    step = run.checkpoint(3)
    facts = {"dataset_hash": "x"}
    files = verify_checkpoint(step)["files"]
    (step / "manifest.json").unlink()
    alone = World(0, 1, torch.device("cpu"))

    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "chmod", refuse)
    checkpoint._write_manifest(step, files, 3, facts, alone)
    assert verify_checkpoint(step)["files"] == files
