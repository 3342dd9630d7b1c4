"""A user table in slices is the whole one, to the bit: in updates, in files, in trainings, through changes of kind."""

from pathlib import Path

import pytest

from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import USER_FILES, StoredUsers, UserTable
from tests.same_run import assert_same_step, figures
from tests.tiny_run import TinyRun
from tests.users.sharded_users_worker import POISONED
from tests.warm import WarmParent


@pytest.fixture(scope="module")
def tables(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded_tables")
    # The ranks themselves compare what an update reads.
    failed = warm("tests.users.sharded_users_worker:every_table", out)
    assert not failed, "\n".join(failed)
    return out


def content(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in USER_FILES]


def test_slices_and_the_whole_are_saved_alike(tables: Path) -> None:
    for name in ("half", "end"):
        assert content(tables / f"sharded_{name}") == content(tables / f"whole_{name}")
    half, end = (StoredUsers(tables / f"sharded_{name}") for name in ("half", "end"))
    assert half.ids == end.ids
    assert content(tables / "whole_half") != content(tables / "whole_end")


@pytest.mark.parametrize("then", [1, 3])
@pytest.mark.parametrize("stored", ["sharded_half", "whole_half"])
def test_other_worlds_and_kinds_go_on_with_either(tables: Path, stored: str, then: int) -> None:
    for kind in ("sharded", "whole"):
        found = tables / f"{kind}_{stored}_then_{then}"
        assert content(found) == content(tables / "whole_end")


def test_a_full_disk_is_told_to_all_ranks(tables: Path) -> None:
    for rank in (0, 1):
        assert "No space left" in (tables / f"told_{rank}").read_text()


@pytest.fixture(scope="module")
def runs(warm: WarmParent, tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded_runs")
    failed = warm("tests.users.sharded_users_worker:every_training", *tiny_run, out)
    assert not failed, "\n".join(failed)
    return out


@pytest.mark.parametrize("name", ["sharded", "whole_then_sharded", "sharded_then_whole"])
def test_trainings_do_not_depend_on_the_kind(runs: Path, name: str) -> None:
    whole, other = RunDirectory(runs / "whole"), RunDirectory(runs / name)
    # A run that was stopped after its skipped update has saved there, too.
    assert whole.complete_steps() == [1, 2, 4, 5]
    assert set(whole.complete_steps()) <= set(other.complete_steps())
    for step in whole.complete_steps():
        assert assert_same_step(whole.checkpoint(step), other.checkpoint(step)) >= 8
    # Figures on dev among them.
    assert figures(whole.path) == figures(other.path)
    assert any("dev_accuracy" in str(row) for row in figures(whole.path))


@pytest.mark.parametrize("name", ["sharded", "whole"])
def test_a_skipped_update_leaves_the_rows_alone(runs: Path, name: str) -> None:
    run = RunDirectory(runs / name)
    skipped = [row["step"] for row in run.read_metrics() if row.get("skipped_updates")]
    assert skipped == [POISONED + 1]
    before, after = (UserTable.load(run.checkpoint(step)) for step in (POISONED, POISONED + 2))
    # Step 3 is not saved while updates are skipped; step 4 is one update further than step 2.
    moved = after.step - before.step
    assert int(moved.max()) == 1 and bool(moved.any())
