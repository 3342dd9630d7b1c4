"""Finished trainings, one after the other, each of two real processes: how many end with exit code 0 on both ranks.

    python tools/bench/bench_exits.py [--runs 50] [--out runs/bench_exits]

A process that aborts while the interpreter goes, after all its work is done, would make SLURM call the job failed.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
NUM_RANKS = 2
RECIPE = {
    "data": {
        "source": {
            "class_path": "Synthetic",
            "init_args": {"num_users": 4, "comparisons_per_user": 10},
        },
        "vocab_size": 300,
        "max_length": 160,
        "split": "field",
    },
    "backbone": {
        "architecture": {
            "model_type": "llama",
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 256,
        }
    },
    "head": {"class_path": "PalA", "init_args": {"num_prototypes": 3}},
    "train": {"ds_config": "zero3_cpu", "batch_pairs": 8, "micro_batch_pairs": 4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_exits"))
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    recipe = options.out / "recipe.yaml"
    recipe.write_text(
        json.dumps(RECIPE | {"data": RECIPE["data"] | {"path": str(options.out / "data")}})
    )
    good = 0
    for number in range(options.runs):
        run_dir = options.out / f"run_{number}"
        codes = train(recipe, run_dir)
        status = run_dir / "status.json"
        state = json.loads(status.read_text())["state"] if status.is_file() else "never began"
        good += codes == [0] * NUM_RANKS and state == "finished"
        print(f"run {number}: {state}, exit codes {codes}", flush=True)
        shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    print(f"{good} of {options.runs}")
    sys.exit(0 if good == options.runs else 1)


def train(recipe: Path, run_dir: Path) -> list[int]:
    """One training; the exit codes of its ranks. What they print goes to `run_dir`.log."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["train", f"--config={recipe}", f"--run_dir={run_dir}"]
    shared = {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "WORLD_SIZE": str(NUM_RANKS),
        "LOCAL_WORLD_SIZE": str(NUM_RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with open(f"{run_dir}.log", "w") as log:
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "pal_ds", *words],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in range(NUM_RANKS)
        ]
        return [rank.wait(timeout=600) for rank in ranks]


if __name__ == "__main__":
    main()
