"""Users whom a run does not know: who fits a user `population` says what they are like; who was removed is none."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pal_ds.cli.main import main
from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.forget import forget_user
from pal_ds.eval.evaluate import evaluate_run
from pal_ds.eval.results import split_request
from pal_ds.inference.load_run import restore
from pal_ds.inference.readers import known_users
from pal_ds.runs.run_dir import RunDirectory
from tests.adaptation.test_ask import TRAIN, vectors, words, write_lines

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers")
    data, reliability = f"--data.path={folder / 'data'}", "--users.reliability=learnt"
    main([*TRAIN, data, reliability, f"--run_dir={folder / 'run'}"])
    return folder


@pytest.mark.parametrize("name", ["population", "mia"])
def test_strangers_are_scored_as_the_population_that_was_fitted(
    place: Path, tmp_path: Path, name: str
) -> None:
    draw = np.random.default_rng(0)
    lines = [{**vectors(draw), "y": 1, "user_id": name} for _ in range(20)]
    pairs = write_lines(tmp_path / "pairs.jsonl", lines)
    main(words("adapt", place, f"--pairs={pairs}", f"--out={tmp_path / 'users'}"))
    restored = restore(RunDirectory(place / "run"))
    known, of_run = known_users(restored, tmp_path / "users"), known_users(restored, None)
    for values, own in (
        (known.mixtures, of_run.mixtures),
        (known.log_reliability, of_run.log_reliability),
    ):
        assert values is not None and own is not None and len(values) == len(own) + 1
        torch.testing.assert_close(values[-1], values[-2] if name == "population" else own[-1])
        assert not torch.equal(values[-2], own[-1])


def test_who_was_removed_is_no_stranger(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "run", tmp_path / "run")
    run, request = RunDirectory(tmp_path / "run"), split_request("dev")
    before = evaluate_run(run, ALONE, request=request)
    assert not before["unknown_users"]["pairs"] and "removed" not in str(before["warnings"])
    data = restore(run).data
    table, users = data.comparisons[data.rows("dev")], list(data.users)
    for user in users[1:]:
        forget_user(run, user)
    after = evaluate_run(run, ALONE, request=request)
    num_removed = int((table["user"] != 0).sum())
    assert after["unknown_users"]["pairs"] == num_removed
    (said,) = [warning for warning in after["warnings"] if "removed" in warning]
    assert said.startswith(f"{num_removed} comparisons are of users who were removed from the run")
    assert "unseen users are predicted better" not in str(after["warnings"])
