"""Ranks that were started differently: refused at start and at resume, by the name of what differs and the rank."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pal_ds.runs.run_dir import RunDirectory
from tests.spawn import outcome_of
from tests.tiny import LLAMA, data_keys

OWN_HEAD = "from pal_ds.heads import PalA\n\n\nclass Mine(PalA):\n    pass\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that names its files from the current directory, and a run of it that stopped after one update."""
    folder = tmp_path_factory.mktemp("agreement")
    keys = data_keys(folder, 48, dev_fraction=0.0, test_fraction=0.0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    recipe = {
        "data": {**keys, "path": "data"},
        "backbone": {"architecture": {**LLAMA, **small}},
        "head": {"class_path": "PalA", "init_args": {"num_prototypes": 3}},
        "train": {"ds_config": "zero0", "batch_pairs": 8, "micro_batch_pairs": 4, "stop_after": 1},
    }
    (folder / "recipe.json").write_text(json.dumps(recipe))
    (folder / "mine.py").write_text(OWN_HEAD)
    [(code, said), _] = start(folder, folder, folder / "run")
    assert code == 0, said
    assert RunDirectory(folder / "run").complete_steps() == [1]
    return folder


def start(folder: Path, case: object, run_dir: Path, *more: str) -> list[tuple[int, str]]:
    """Exit status and output of both ranks, which begin in `folder`."""
    words = ["train", f"--config={folder / 'recipe.json'}", f"--run_dir={run_dir}", *more]
    arguments = ["tests.training.disagreeing_rank", str(case), *words]
    return outcome_of("tests.in_folder", folder, *arguments, num_ranks=2, timeout=60)


def refused(folder: Path, case: object, run_dir: Path, *more: str) -> str:
    """What rank 0 says, after no rank has trained anything."""
    outcome = start(folder, case, run_dir, *more)
    assert [code for code, _ in outcome] == [2, 2], outcome
    assert "Traceback" not in outcome[0][1]
    return " ".join(outcome[0][1].split())


CASES = {
    "learning rate": "optim.learning_rate is 0.5 on rank 1",
    "seed": "train.seed is 5 on rank 1, 0 on rank 0",
    "micro-batch": "train.micro_batch_pairs is 2 on rank 1, 4 on rank 0",
    "epochs": "train.epochs is 3 on rank 1, 1 on rank 0",
    "head": "head.init_args.num_prototypes is 2 on rank 1, 3 on rank 0",
    "engine": "train.ds_config",
    "allow": '--allow_change is ["optim.learning_rate"] on rank 1, [] on rank 0',
    "run directory": '--run_dir is "',
    "code": "code of pal_ds is",
    "library": 'version of torch is "0.0.1" on rank 1',
}


@pytest.mark.parametrize("case", CASES)
def test_at_the_start(folder: Path, tmp_path: Path, case: str) -> None:
    said = refused(folder, case, tmp_path / "run")
    assert "the ranks were not started alike" in said and CASES[case] in said
    assert not list(tmp_path.glob("run*"))


@pytest.mark.parametrize("case", ["learning rate", "micro-batch", "epochs", "code"])
def test_at_resume(folder: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(folder / "run", tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    said = refused(folder, case, tmp_path / "run", "--train.stop_after=2")
    assert CASES[case] in said
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


@pytest.fixture
def elsewhere(folder: Path, tmp_path: Path) -> Path:
    """A copy of what the recipe names from its directory, as on another node."""
    copy = tmp_path / "node"
    shutil.copytree(folder / "data", copy / "data")
    (copy / "mine.py").write_text(OWN_HEAD)
    return copy


def test_a_copy_of_the_data_serves(folder: Path, elsewhere: Path, tmp_path: Path) -> None:
    outcome = start(folder, elsewhere, tmp_path / "run")
    assert [code for code, _ in outcome] == [0, 0], outcome


def test_other_labels_behind_the_same_hash(folder: Path, elsewhere: Path, tmp_path: Path) -> None:
    table = np.load(elsewhere / "data" / "comparisons.npy")
    table["label"] *= -1
    np.save(elsewhere / "data" / "comparisons.npy", table)
    said = refused(folder, elsewhere, tmp_path / "run")
    assert "rank 1: data/comparisons.npy: does not match its hash" in said


def test_other_data(folder: Path, elsewhere: Path, tmp_path: Path) -> None:
    from pal_ds.data.prepare import DataConfig, prepare
    from pal_ds.data.sources import Jsonl
    from tests.tiny import write_pairs

    shutil.rmtree(elsewhere / "data")
    source = Jsonl(str(write_pairs(tmp_path / "pairs.jsonl", 30, seed=1)))
    prepare(DataConfig(path=str(elsewhere / "data"), source=source, vocab_size=300), quiet=True)
    assert "hash of data.path is" in refused(folder, elsewhere, tmp_path / "run")


def test_other_code_of_ones_own(folder: Path, elsewhere: Path, tmp_path: Path) -> None:
    (elsewhere / "mine.py").write_text(OWN_HEAD.replace("pass", "temperature = 2"))
    said = refused(folder, elsewhere, tmp_path / "run", "--head=mine.Mine")
    assert "file of one's own.mine.py is" in said
