"""Evaluation is exact: nine pairs give the same figures on one, two and three ranks; strangers are reported apart.

One of the two runs weighs every token, the other has a hinge loss, whose margins are calibrated on its dev pairs.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pal_ds import evaluate_run as evaluating
from pal_ds.engine.dist import World
from pal_ds.errors import UserError
from pal_ds.evaluate_run import evaluate_run, opened_pairs
from pal_ds.restore import restore
from pal_ds.run_dir import RunDirectory
from tests.spawn import run_command, run_ranks
from tests.tiny import LLAMA, write_pairs

ALONE = World(0, 1, torch.device("cpu"))
TUNINGS = {
    "full": ["--loss.token_weighting=cumulative", "--train.shuffle_unit=item"],
    "frozen": ["--loss.kind=hinge"],
}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    pairs = write_pairs(folder / "pairs.jsonl", 60)
    nine = write_pairs(folder / "nine.jsonl", 9, num_users=4, seed=1)
    options = [
        f"--data.path={folder / 'data'}",
        "--data.source=Jsonl",
        f"--data.source.path={pairs}",
        "--data.vocab_size=400",
        "--data.max_length=64",
        "--data.dev_fraction=0.2",
        f"--backbone.architecture={json.dumps(LLAMA)}",
        "--head=PalA",
        "--head.num_prototypes=3",
        "--train.batch_pairs=16",
        "--optim.learning_rate=3e-3",
        "--train.ds_config=zero0",
    ]
    for tuning, more in TUNINGS.items():
        run_command(
            "train",
            *options,
            *more,
            f"--backbone.tuning={tuning}",
            f"--run_dir={folder / tuning}",
        )
        (folder / f"{tuning}_out").mkdir()
        for num_ranks in (1, 2, 3):
            run_ranks(
                num_ranks,
                "tests.engine.evaluate_worker",
                folder / tuning,
                nine,
                folder / f"{tuning}_out",
            )
    return folder


@pytest.mark.parametrize("tuning", TUNINGS)
def test_same_on_every_world_size(evaluated: Path, tuning: str) -> None:
    out = evaluated / f"{tuning}_out"
    figures = {n: json.loads((out / f"figures{n}.json").read_text()) for n in (1, 2, 3)}
    margins = {n: np.load(out / f"margins{n}.npy") for n in (1, 2, 3)}
    assert len(margins[1]) == 9
    assert np.ptp(margins[1]) > 1e-3
    for num_ranks in (2, 3):
        assert np.abs(margins[num_ranks] - margins[1]).max() <= 1e-6
        for section in (lambda found: found, lambda found: found["unknown_users"]):
            one, many = section(figures[1]), section(figures[num_ranks])
            assert one["users"] == many["users"]
            assert (one["pairs"], one["accuracy"]) == (many["pairs"], many["accuracy"])


def test_strangers_are_apart(evaluated: Path) -> None:
    figures = json.loads((evaluated / "full_out" / "figures1.json").read_text())
    assert set(figures["users"]) == {"u0", "u1", "u2"}
    assert set(figures["unknown_users"]["users"]) == {"u3"}
    assert figures["pairs"] + figures["unknown_users"]["pairs"] == 9
    assert figures["prompts_seen_in_training"] > 0
    written = json.loads((evaluated / "full" / "eval" / "world2.json").read_text())
    assert written["pairs"] == figures["pairs"]


def test_accuracy_is_that_of_the_margins(evaluated: Path) -> None:
    """Against a count made by hand from the file."""
    rows = [json.loads(line) for line in (evaluated / "nine.jsonl").read_text().splitlines()]
    margins = np.load(evaluated / "full_out" / "margins1.npy")
    # In this record form the first response is the chosen one.
    right = margins < 0
    figures = json.loads((evaluated / "full_out" / "figures1.json").read_text())
    known = np.asarray([row["user_id"] != "u3" for row in rows])
    assert figures["accuracy"] == pytest.approx(right[known].mean())
    assert figures["unknown_users"]["accuracy"] == pytest.approx(right[~known].mean())


@pytest.fixture
def hinge_run(evaluated: Path) -> RunDirectory:
    return RunDirectory(evaluated / "frozen")


def test_temperature_is_that_of_the_step(evaluated: Path, hinge_run: RunDirectory) -> None:
    """Whatever is evaluated, and although best.json may be about another step."""
    best = hinge_run.path / "best.json"
    said = best.read_text()
    best.unlink()
    try:
        split = evaluate_run(hinge_run, ALONE, split="dev")["temperature"]
        file = evaluate_run(hinge_run, ALONE, file=evaluated / "nine.jsonl", name="t")
    finally:
        best.write_text(said)
    assert split != 1.0
    assert file["temperature"] == split
    # This run has one step, at which training fitted it, too.
    assert split == pytest.approx(json.loads(said)["temperature"], rel=1e-3)


def test_temperature_of_the_logistic_loss_is_one(evaluated: Path) -> None:
    figures = json.loads((evaluated / "full_out" / "figures1.json").read_text())
    assert figures["temperature"] == 1.0


def test_files_of_one_name_do_not_meet(evaluated: Path, hinge_run: RunDirectory) -> None:
    """Two evaluations of files called alike at the same time; nothing is left of either."""
    restored = restore(hinge_run)
    (evaluated / "other").mkdir()
    alike = write_pairs(evaluated / "other" / "nine.jsonl", 5, num_users=2, seed=3)
    with opened_pairs(restored, evaluated / "nine.jsonl", ALONE) as nine:
        with opened_pairs(restored, alike, ALONE) as five:
            assert nine.path != five.path
            assert (len(nine.comparisons), len(five.comparisons)) == (9, 5)
        assert nine.path.is_dir()
    assert not list(hinge_run.path.glob("pairs-of-*"))


def test_nothing_is_left_of_a_file_that_is_refused(
    evaluated: Path, hinge_run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = evaluated / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(UserError, match=r"bad\.jsonl:1"):
        evaluate_run(hinge_run, ALONE, file=bad)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(evaluating, "predict", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        evaluate_run(hinge_run, ALONE, file=evaluated / "nine.jsonl")
    assert not list(hinge_run.path.glob("pairs-of-*"))
