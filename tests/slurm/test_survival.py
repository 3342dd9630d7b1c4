"""Trainings under SLURM: whatever interrupts them, they end finished, with the weights of a run nobody disturbed."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.same_run import assert_same_step, figures
from tests.slurm.cluster import SECRET, Cluster, rows, until
from tests.slurm.disturbances import CHAINS, PLACES, SAVE_EVERY, UPDATES_MADE_AGAIN, Runs, restarts
from tests.spawn import ROOT, environment, run_command, torchrun
from tests.tiny import LLAMA, write_pairs

NUM_UPDATES = 265


@pytest.fixture(scope="module")
def recipe(cluster: Cluster) -> Path:
    """A decoder so tiny that starting costs more than training, long enough to be interrupted."""
    folder = cluster.folder
    content = {
        "data": {
            "path": str(folder / "data"),
            "source": {
                "class_path": "Jsonl",
                "init_args": {"path": str(write_pairs(folder / "pairs.jsonl", 460))},
            },
            "vocab_size": 400,
            "max_length": 64,
            "dev_fraction": 0.0,
            "test_fraction": 0.2,
        },
        "backbone": {"architecture": LLAMA},
        "head": {"class_path": "PalA", "init_args": {"num_prototypes": 3}},
        "train": {
            "ds_config": "zero3_cpu",
            "batch_pairs": 8,
            "micro_batch_pairs": 4,
            "log_every": 1,
            "save_every": SAVE_EVERY,
            "epochs": 5,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content))
    run_command("prepare", f"--config={path}")
    return path


@pytest.fixture(scope="module")
def runs(cluster: Cluster, recipe: Path) -> Runs:
    found = Runs(cluster, recipe)
    with ThreadPoolExecutor() as threads:
        # By another launcher, at the same world size.
        words = [f"--config={recipe}", f"--run_dir={found.path('torchrun')}"]
        launched = threads.submit(torchrun, 2, "pal_ds", "train", *words)
        # DeepSpeed's operators are built by then: nothing may be killed while it builds them.
        until(
            lambda: rows(found.path("torchrun") / "metrics.jsonl") or launched.done(), "start", 280
        )
        found.submit_whole()
        for name, place in PLACES.items():
            found.submit(name, place)
        found.submit_hostfile()
        for chain in [threads.submit(found.go_through, name) for name in CHAINS]:
            chain.result()
        done = launched.result()
        assert done.returncode == 0, done.stderr[-6000:]
    cluster.wait(*found.jobs.values())
    return found


def test_weights_are_those_of_torchrun(runs: Runs) -> None:
    last = f"checkpoints/step_{NUM_UPDATES:08d}"
    assert assert_same_step(runs.path("torchrun") / last, runs.path("whole") / last) >= 8
    assert figures(runs.path("torchrun")) == figures(runs.path("whole"))
    assert [start["tasks"] for start in runs.starts("whole")] == [2]


def test_a_hostfile_does_without_slurm(runs: Runs) -> None:
    assert figures(runs.path("hostfile")) == figures(runs.path("whole"))[:SAVE_EVERY]


@pytest.mark.parametrize("name", CHAINS)
def test_a_disturbed_run_ends_with_the_weights_of_an_undisturbed_one(runs: Runs, name: str) -> None:
    last = f"checkpoints/step_{NUM_UPDATES:08d}"
    assert assert_same_step(runs.path("whole") / last, runs.path(name) / last) >= 8
    assert figures(runs.path("whole")) == figures(runs.path(name))
    status = json.loads((runs.path(name) / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", NUM_UPDATES)


@pytest.mark.parametrize(
    ("name", "number"),
    [(name, number) for name, events in CHAINS.items() for number in range(len(events))],
    ids=[event.__name__ for events in CHAINS.values() for event in events],
)
def test_few_updates_are_made_again(runs: Runs, name: str, number: int) -> None:
    before, after = runs.starts(name)[number : number + 2]
    lost = after["logged_step"] - after["checkpoint_step"]
    print(f"{CHAINS[name][number].__name__}: {lost} updates made again")
    assert after["checkpoint_step"] >= before["checkpoint_step"]
    assert 0 <= lost <= UPDATES_MADE_AGAIN[CHAINS[name][number]]


@pytest.mark.parametrize("name", CHAINS)
def test_every_event_starts_the_job_once(runs: Runs, name: str) -> None:
    """A job that requeues itself although SLURM does so as well would show more starts."""
    assert [start["start"] for start in runs.starts(name)] == list(range(len(CHAINS[name]) + 1))
    assert restarts(runs, name) == len(CHAINS[name])


def test_the_log_goes_on_over_starts(runs: Runs) -> None:
    log = runs.log("asked")
    assert [f"start {number}: 2 ranks on" in log for number in range(4)] == [True] * 4
    assert log.count("asking the ranks to save and stop") >= 1


def test_code_and_recipes_are_kept_and_secrets_are_not(runs: Runs) -> None:
    record = runs.path("whole") / "slurm" / runs.jobs["whole"]
    assert (record / "recipe.yaml").read_text() == runs.recipe.read_text()
    assert (record / "config.yaml").read_text() == (runs.path("whole") / "config.yaml").read_text()
    for name in ("pal_ds/training/loop.py", "ds_configs/zero3.json", "slurm/common.sh"):
        assert (record / "code" / name).read_bytes() == (ROOT / name).read_bytes()
    folder = runs.cluster.folder
    found = subprocess.run(["grep", "-rlF", SECRET, str(folder)], capture_output=True, text=True)
    assert found.stdout == "" and found.returncode == 1


def test_evaluate_adapt_and_consolidate(runs: Runs) -> None:
    """The rest of the way from a checkpoint to figures, new users and a reward model."""
    cluster, run = runs.cluster, runs.path("whole")
    pairs = write_pairs(cluster.folder / "new.jsonl", 60, num_users=6, seed=1)
    shape = ("--nodes=2", "--cpus-per-task=1", "--time=10")
    evaluation = cluster.sbatch(*shape, ROOT / "slurm" / "evaluate.sbatch", "runs/whole")
    script, words = ROOT / "slurm" / "adapt.sbatch", ("runs/whole", pairs.name, "adapted")
    adapting = cluster.sbatch("--array=0-1", "--cpus-per-task=1", "--time=10", script, *words)
    subprocess.run(
        [sys.executable, "tools/consolidate.py", run, cluster.folder / "exported"],
        env=environment(),
        cwd=ROOT,
        check=True,
    )
    run_command("adapt", f"--run_dir={run}", f"--pairs={pairs}", f"--out={cluster.folder / 'one'}")
    cluster.wait(evaluation, adapting)
    result = json.loads((run / "eval" / "test.json").read_text())
    assert result["pairs"] > 0 and 0 <= result["accuracy"] <= 1
    assert (cluster.folder / "exported" / "model.safetensors").is_file()
    check_adapted(cluster.folder / "adapted", cluster.folder / "one")


def check_adapted(sharded: Path, whole: Path) -> None:
    """Users fitted in shards are those fitted together."""
    import torch

    from pal_ds.users import UserTable

    assert len(list((sharded / "shards").glob("[0-9]/report.json"))) == 2
    together, apart = UserTable.load(whole), UserTable.load(sharded)
    assert sorted(together.ids) == sorted(apart.ids) and len(apart) == 6
    mixtures = apart.mixtures()[apart.rows(together.ids)]
    assert torch.allclose(mixtures, together.mixtures(), atol=1e-4)
    reports = [json.loads((folder / "report.json").read_text()) for folder in (sharded, whole)]
    assert reports[0]["pairs"] == reports[1]["pairs"] == 60
