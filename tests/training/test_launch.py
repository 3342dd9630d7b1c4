"""One recipe by every launcher and under every setting that should leave its losses where they are."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.spawn import ROOT, environment, run_command, run_process, run_ranks, torchrun
from tests.tiny import LLAMA, data_keys

NUM_UPDATES = 10
# Largest difference to the plain fp32 run's loss over ten updates. 2e-6 is 33 steps of fp32 at a loss of 0.7; a weight
# moves by at most 1e-3 / 1e-4 = 10 times what rounding (1e-7 of a gradient) makes of its gradient.
BOUNDS = {
    "offload": 2e-6,
    "bf16": 2e-2,
    "checkpointing": 2e-6,
    "gumbel": 2e-1,
    "token_budget": 2e-6,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launch")
    content = {
        "data": data_keys(folder, 80, dev_fraction=0.0, test_fraction=0.0),
        "backbone": {"path": str(folder / "base")},
        "head": {"class_path": "PalA", "init_args": {"num_prototypes": 3}},
        # A large epsilon: with the usual one Adam turns rounding of tiny gradients into visible steps.
        "optim": {"learning_rate": 1e-3, "epsilon": 1e-4},
        "users": {"epsilon": 1e-4},
        "train": {
            "ds_config": "zero3_cpu",
            "batch_pairs": 8,
            "micro_batch_pairs": 4,
            "log_every": 1,
            "epochs": 1,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(content))
    from pal_ds.backbones.config import BackboneConfig
    from pal_ds.backbones.transformer import materialise_architecture

    run_command("prepare", f"--config={path}")
    vocab_size = json.loads((folder / "data" / "dataset.json").read_text())["tokens"]["vocab_size"]
    materialise_architecture(BackboneConfig(architecture=LLAMA), vocab_size, 0, folder / "base")
    return path


@pytest.fixture(scope="module")
def variants(recipe: Path) -> Path:
    out = recipe.parent / "variants"
    run_ranks(2, "tests.training.launch_worker", recipe, out)
    return out


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [row["loss"] for row in rows if "loss" in row]
    assert len(found) == NUM_UPDATES
    return found


def distance(a: Path, b: Path) -> float:
    return max(abs(x - y) for x, y in zip(losses(a), losses(b), strict=True))


def test_plain_python(recipe: Path, variants: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_dir = recipe.parent / "python"
    tracking = ["--wandb.project=test", "--trackers.csv=true", "--trackers.tensorboard=true"]
    run_process("train", f"--config={recipe}", f"--run_dir={run_dir}", *tracking)
    assert list(run_dir.glob("wandb/offline-run-*"))
    assert len((run_dir / "metrics.csv").read_text().splitlines()) > NUM_UPDATES
    assert list(run_dir.glob("tensorboard/events*"))
    assert distance(recipe.parent / "python", variants / "plain") <= 2e-6


def test_deepspeed_launcher(recipe: Path, variants: Path) -> None:
    """The launcher puts --local_rank before the command, and leaves shared-memory files that we clean up."""
    port = 21000 + os.getpid() % 20000
    launcher = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_gpus",
        "2",
        "--master_port",
        str(port),
    ]
    run_dir = recipe.parent / "deepspeed"
    words = ["--module", "pal_ds", "train", f"--config={recipe}", f"--run_dir={run_dir}"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        done = subprocess.run(
            [*launcher, *words],
            env=environment(PATH=path),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
    finally:
        for leftover in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            leftover.unlink()
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(run_dir) == losses(variants / "plain")


@pytest.mark.parametrize("name", BOUNDS)
def test_settings(variants: Path, name: str) -> None:
    assert distance(variants / name, variants / "plain") <= BOUNDS[name]
    if name != "checkpointing":
        # Equal to the last bit would mean that the setting was not at work, on any processor: DeepSpeed's Adam on the
        # CPU multiplies by the bias correction where torch divides; a budget sums thousands of gradients in groups.
        assert losses(variants / name) != losses(variants / "plain")


def test_workers_change_nothing(variants: Path) -> None:
    assert losses(variants / "workers") == losses(variants / "plain")


def test_gumbel_noise_belongs_to_the_comparison(variants: Path) -> None:
    """Another split into micro-batches meets the same noise."""
    assert distance(variants / "gumbel", variants / "gumbel_again") <= 2e-6


def test_torchrun_command_line(recipe: Path, variants: Path) -> None:
    run_dir = recipe.parent / "torchrun"
    done = torchrun(2, "pal_ds", "train", f"--config={recipe}", f"--run_dir={run_dir}")
    assert done.returncode == 0, done.stderr[-6000:]
    # To the bit, by another launcher: one machine, one world size, one thread a rank.
    assert losses(run_dir) == losses(variants / "plain")
    assert shutil.which("torchrun", path=str(Path(sys.executable).parent)) is not None
