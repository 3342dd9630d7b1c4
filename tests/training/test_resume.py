"""A run that stops and starts again is, bit for bit, the run that never stopped."""

from pathlib import Path

import pytest

from pal_ds.engine.checkpoint.verify import verify_checkpoint
from pal_ds.errors import UserError
from pal_ds.runs.run_dir import RunDirectory
from tests.engine.newest import newest_intact
from tests.same_run import assert_same_step, figures
from tests.spawn import run_ranks
from tests.tiny_run import TinyRun
from tests.training.resume_worker import NUM_UPDATES, STOPS


@pytest.fixture(scope="module")
def runs(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    run_ranks(2, "tests.training.resume_worker", tiny_run.data, tiny_run.base, folder)
    return folder


@pytest.mark.parametrize(
    ("tuning", "stop"), [(tuning, stop) for tuning, stops in STOPS.items() for stop in stops]
)
def test_stopped_run_equals_whole_run(runs: Path, tuning: str, stop: int) -> None:
    whole, stopped = runs / f"{tuning}_whole", runs / f"{tuning}_stopped_{stop}"
    last = f"checkpoints/step_{NUM_UPDATES:08d}"
    # fp32 weights, two moments and a step count per parameter group, on both ranks.
    assert assert_same_step(whole / last, stopped / last) >= 8
    assert figures(stopped) == figures(whole)


@pytest.mark.parametrize("without", ["dropout", "gumbel"])
def test_noise_and_dropout_are_at_work(runs: Path, without: str) -> None:
    """Else the equalities above would say nothing of noise after a resume."""
    first = figures(runs / "full_whole")[0]["loss"]
    assert first != figures(runs / f"full_no_{without}")[0]["loss"]


def test_the_prior_is_at_work(runs: Path) -> None:
    with_prior, without = (
        [line["loss"] for line in figures(runs / name) if "loss" in line]
        for name in ("full_whole", "full_no_prior")
    )
    assert with_prior[0] == without[0]
    assert with_prior[-1] != without[-1]


def test_retention_keeps_the_newest_and_the_best(runs: Path) -> None:
    run = RunDirectory(runs / "full_whole")
    best = run.pointer("best")
    assert best is not None
    assert set(run.complete_steps()) == {NUM_UPDATES, best["step"], *run.complete_steps()[-2:]}
    assert run.pointer("latest") == {
        "step": NUM_UPDATES,
        "path": f"checkpoints/step_{NUM_UPDATES:08d}",
    }


def test_damage_is_named(runs: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs / "lora_whole", tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    newest = run.checkpoint(NUM_UPDATES)
    (newest / "users.arrow").unlink()
    with pytest.raises(UserError, match=r"users\.arrow: named in the manifest but missing"):
        verify_checkpoint(newest)
    found = newest_intact(run)
    assert found is not None
    assert found[0] != newest
