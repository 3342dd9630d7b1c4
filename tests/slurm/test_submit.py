"""submit.py: what it hands to sbatch, what it refuses, and what it writes down."""

import json
import shlex
from pathlib import Path

import pytest

from tests.spawn import ROOT, run_command
from tests.tiny import LLAMA, data_keys
from tools import submit


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with prepared data, and one without."""
    folder = tmp_path_factory.mktemp("submit")
    content = {
        "data": data_keys(folder, 40),
        "backbone": {"architecture": LLAMA},
        "head": {"class_path": "PalA", "init_args": {"num_prototypes": 3}},
        "train": {"ds_config": "zero3_cpu", "batch_pairs": 8},
    }
    (folder / "tiny.yaml").write_text(json.dumps(content))
    content["data"]["path"] = str(folder / "not_there")
    (folder / "raw.yaml").write_text(json.dumps(content))
    run_command("prepare", f"--config={folder / 'tiny.yaml'}")
    return folder


@pytest.fixture(autouse=True)
def in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def a_run(path: Path, world_size: int) -> None:
    """What a trained run looks like to whoever does not load it."""
    step = path / "checkpoints" / "step_00000020"
    step.mkdir(parents=True)
    (step / "manifest.json").write_text(json.dumps({"world_size": world_size, "step": 20}))
    words = ["train", "--config=tiny.yaml", f"--run_dir={path}"]
    from pal_ds.cli.main import build_parser
    from pal_ds.config.recipe import dump_recipe

    parsed = build_parser().parse_args(words)
    (path / "config.yaml").write_text(dump_recipe(parsed["train"]))


def test_dry_run_prints_the_command_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    before = sorted(folder.rglob("*"))
    shape = ["--nodes=2", "--gpus_per_node=4", "--time=24:00:00", "--partition=p", "--account=a"]
    submit.main(["train", "tiny.yaml", *shape, "--dry_run", "--", "--train.epochs", "2"])
    assert shlex.split(capsys.readouterr().out) == [
        "sbatch",
        "--parsable",
        "--output=runs/tiny/slurm/%x-%j.out",
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--time=24:00:00",
        "--partition=p",
        "--account=a",
        str(ROOT / "slurm" / "train.sbatch"),
        "tiny.yaml",
        "--run_dir=runs/tiny",
        "--train.epochs",
        "2",
    ]
    assert sorted(folder.rglob("*")) == before


def test_adapt_asks_for_no_gpu(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    a_run(folder / "trained", world_size=2)
    submit.main(["adapt", "trained", "pairs.jsonl", "out", "--array=0-2", "--dry_run"])
    command = shlex.split(capsys.readouterr().out)
    assert "--array=0-2" in command and command[-3:] == ["trained", "pairs.jsonl", "out"]
    assert not [word for word in command if "gpus" in word or "nodes" in word]


def test_embed_is_recorded_in_the_cache(capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--backbone.cache=cache", "--backbone.tuning=frozen"]
    keys += ["--backbone.path=base", "--backbone.architecture=null"]
    submit.main(["embed", "tiny.yaml", "--nodes=2", "--dry_run", "--", *keys])
    command = shlex.split(capsys.readouterr().out)
    assert "--output=cache/slurm/%x-%j.out" in command and "--nodes=2" in command
    assert command[-6:] == [str(ROOT / "slurm" / "embed.sbatch"), "tiny.yaml", *keys]


def test_another_number_of_ranks_is_announced(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    a_run(folder / "two_ranks", world_size=2)
    words = ["train", "tiny.yaml", "--run_dir=two_ranks", "--dry_run"]
    submit.main([*words, "--nodes=2"])
    assert "resharded" not in capsys.readouterr().err
    submit.main([*words, "--nodes=4"])
    assert "of 2 ranks and will be resharded to 4" in capsys.readouterr().err


REFUSALS = {
    "no such recipe": (["train", "missing.yaml"], "missing.yaml: no such file"),
    "misspelt option": (["train", "tiny.yaml", "--nods=2"], "Did you mean nodes?"),
    "misspelt key": (["train", "tiny.yaml", "--", "--train.epoch=2"], "train.epochs"),
    "no nodes": (["train", "tiny.yaml", "--nodes=0"], "--nodes is 0; it must be at least 1"),
    "tasks without GPUs": (
        ["train", "tiny.yaml", "--gpus_per_node=2", "--ntasks_per_node=4"],
        "a rank drives one GPU",
    ),
    "more ranks than pairs": (
        ["train", "tiny.yaml", "--nodes=4", "--gpus_per_node=4"],
        "train.batch_pairs is 8 and the job has 16 ranks",
    ),
    "raw data on several nodes": (
        ["train", "raw.yaml", "--nodes=2"],
        "pal-ds prepare --config raw.yaml",
    ),
    "no such ds_config": (
        ["train", "tiny.yaml", "--", "--train.ds_config=zero9"],
        "train.ds_config: no file",
    ),
    "ranks that would die of the signal": (
        ["train", "tiny.yaml", "--", "--train.stop_signals=[TERM]"],
        "train.stop_signals is TERM, and the job tells its ranks to save by USR2",
    ),
    "fresh in a run's directory": (
        ["train", "tiny.yaml", "--run_dir=trained", "--", "--fresh"],
        "--fresh needs an empty directory",
    ),
    "recipes of one name": (
        ["sweep", "tiny.yaml", "sub/tiny.yaml", "--array=0-1"],
        "two recipes of one name",
    ),
    "a seed that was trained with another recipe": (
        ["sweep", "tiny.yaml", "--array=0-3", "--run_dir=seeds"],
        "seeds/tiny/seed_2/config.yaml: this run was started with other values: train.seed: 0 -> 2",
    ),
    "embed without a cache": (["embed", "tiny.yaml"], "backbone.cache: not set"),
    "embed with a run directory": (
        ["embed", "tiny.yaml", "--run_dir=runs/x"],
        "--run_dir runs/x: embed fills the one folder backbone.cache",
    ),
    "embed as an array": (["embed", "tiny.yaml", "--array=0-3"], "Leave --array out"),
    "encoders that would die of the signal": (
        [
            *("embed", "tiny.yaml", "--", "--backbone.cache=c", "--backbone.path=base"),
            *("--backbone.tuning=frozen", "--backbone.architecture=null"),
            "--train.stop_signals=[TERM]",
        ],
        "train.stop_signals is TERM, and the job tells its ranks to save by USR2",
    ),
    "embed raw data on several nodes": (
        [
            *("embed", "raw.yaml", "--nodes=2", "--", "--backbone.cache=c", "--backbone.path=base"),
            *("--backbone.tuning=frozen", "--backbone.architecture=null"),
        ],
        "pal-ds prepare --config raw.yaml",
    ),
    "two recipes": (["train", "tiny.yaml", "raw.yaml"], "train takes one RECIPE"),
    "too few recipes": (["sweep", "tiny.yaml", "raw.yaml", "--array=0-2"], "only 2 recipes"),
    "array in words": (["sweep", "tiny.yaml", "--array=all"], "give a range such as 0-7"),
    "no run": (["evaluate", "nowhere"], "nowhere: no config.yaml here"),
    "adapt without OUT": (["adapt", "trained", "pairs.jsonl"], "adapt takes RUN PAIRS OUT"),
    "adapt without pairs": (["adapt", "trained", "none.jsonl", "out"], "none.jsonl: no such file"),
    "more shards than users": (
        ["adapt", "trained", "pairs.jsonl", "out", "--array=0-7"],
        "8 shards for 3 users",
    ),
    "shards that miss the first": (
        ["adapt", "trained", "pairs.jsonl", "out", "--array=1-2"],
        "count from 0",
    ),
    "a key that alters the result": (
        ["train", "tiny.yaml", "--run_dir=trained", "--", "--train.seed=9"],
        "train.seed: 0 -> 9",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(capsys: pytest.CaptureFixture[str], folder: Path, case: str) -> None:
    for run in (folder / "trained", folder / "seeds" / "tiny" / "seed_2"):
        if not run.exists():
            a_run(run, world_size=2)
    words, wanted = REFUSALS[case]
    with pytest.raises(SystemExit) as stop:
        submit.main([words[0], "--dry_run", *words[1:]])
    found = capsys.readouterr()
    assert stop.value.code == 2 and wanted in found.err, found.err
    assert found.out == "" and "Traceback" not in found.err


def test_options_of_sbatch_are_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--mem", "64G", "--mail_type=END,FAIL", "--exclusive", "--ntasks-per-core=1"]
    submit.main(["train", *words, "tiny.yaml", "--dry_run", "--", "--train.epochs", "2"])
    command = shlex.split(capsys.readouterr().out)
    script = next(place for place, word in enumerate(command) if word.endswith("train.sbatch"))
    passed_on = ["--mem=64G", "--mail-type=END,FAIL", "--exclusive", "--ntasks-per-core=1"]
    assert command[script - 4 : script] == passed_on
    assert command[script + 1] == "tiny.yaml" and command[-2:] == ["--train.epochs", "2"]


def test_a_shipped_recipe_goes_by_its_name_and_memory_is_planned(
    capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    layers = ["--", "--config=tiny.yaml", f"--data.path={folder / 'data'}"]
    submit.main(["train", "quickstart_pal_a", "--dry_run", *layers])
    found = capsys.readouterr()
    assert "pal_ds/recipes/quickstart_pal_a.yaml" in found.out
    assert "each of 1 GPUs needs about 0.0 GiB" in found.err
    # Of a run on CPUs there is nothing to say.
    submit.main(["train", "tiny.yaml", "--dry_run", "--gpus_per_node=0"])
    assert capsys.readouterr().err == ""


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    path = folder / "bin" / "sbatch"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:/usr/bin:/bin")


def test_the_job_is_written_down(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(folder, monkeypatch, "echo '4711;cluster'")
    monkeypatch.setenv("WANDB_API_KEY", "not-to-be-written")
    submit.main(["train", "tiny.yaml", "--run_dir=noted", "--nodes=2"])
    assert "job 4711" in capsys.readouterr().out
    text = (folder / "noted" / "slurm" / "jobs.jsonl").read_text()
    assert json.loads(text)["job"] == "4711" and "not-to-be-written" not in text


def test_what_sbatch_says_is_passed_on(
    capsys: pytest.CaptureFixture[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(folder, monkeypatch, "echo 'sbatch: error: invalid partition' >&2; exit 1")
    with pytest.raises(SystemExit) as stop:
        submit.main(["train", "tiny.yaml", "--run_dir=refused"])
    assert stop.value.code == 2
    assert "sbatch refused: sbatch: error: invalid partition" in capsys.readouterr().err
    assert not (folder / "refused" / "slurm" / "jobs.jsonl").exists()


def test_without_slurm_it_says_where_to_go(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(SystemExit) as stop:
        submit.main(["train", "tiny.yaml", "--run_dir=elsewhere"])
    assert stop.value.code == 2 and "login node" in capsys.readouterr().err
