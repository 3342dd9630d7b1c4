"""Trains each method on ranks forked from a warm parent and follows it to the end, for test_methods."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from pal_ds.runs.run_dir import RunDirectory
from tests.engine.kills import command
from tests.tiny import LLAMA, TOPICS
from tests.warm import fork_ranks, wait_for

METHODS: dict[str, dict[str, Any]] = {
    "vpl": {"head": {"class_path": "Vpl", "init_args": {"latent_dim": 8, "width": 32}}},
    "vpl_mlp": {
        "head": {
            "class_path": "Vpl",
            "init_args": {
                "latent_dim": 4,
                "width": 8,
                "symmetry": "none",
                "reward_form": "mlp",
                "kl_schedule": "cosine",
                "kl_period": 5,
                "swap_guidance": 0.1,
            },
        },
        "users": {"generic_fraction": 0.5},
    },
    "spl": {"head": {"class_path": "Spl"}},
    "mrm": {"head": {"class_path": "Mrm", "init_args": {"num_prototypes": 3}}},
    "vrf": {
        "head": {"class_path": "Vrf", "init_args": {"latent_dim": 4, "width": 32}},
        "optim": {"learning_rate": 3e-2, "epsilon": 1e-4},
    },
    "lore": {
        "head": {"class_path": "Lore", "init_args": {"num_prototypes": 3}},
        "users": {"generic_fraction": 0.5},
    },
    "per_domain": {"head": {"class_path": "PerDomain", "init_args": {"num_prototypes": 2}}},
    "mean_variance": {"head": {"class_path": "MeanVariance"}},
    "categorical": {"head": {"class_path": "Categorical"}},
}


def make_place(folder: str) -> None:
    """Four users, two of whom like short answers (group brief) and two long ones, and new users of either kind."""
    place = Path(folder)
    place.mkdir(exist_ok=True)
    draw = np.random.default_rng(0)
    for name, users, num_pairs in (("pairs", "abcd", 96), ("new", "xy", 16)):
        with open(place / f"{name}.jsonl", "w") as stream:
            for index in range(num_pairs):
                user, topic = users[index % len(users)], TOPICS[int(draw.integers(len(TOPICS)))]
                short = f"{topic.capitalize()} is fine {draw.integers(30)}."
                long = f"Well, {topic} is something one could talk about for hours {draw.integers(30)}."
                brief = index % 2 == 0
                row = {"user_id": user, "prompt": f"About {topic} {draw.integers(9)}?"}
                row |= {"group": "brief" if brief else "wordy"}
                row |= dict(
                    zip(("chosen", "rejected"), (short, long)[:: 1 if brief else -1], strict=True)
                )
                stream.write(json.dumps(row) + "\n")


def train(folder: str, method: str) -> dict[str, Any]:
    """The losses and the last dev accuracy on one and on two ranks, ZeRO-3, and the user table's size."""
    place, told = Path(folder), {}
    source = {"class_path": "Jsonl", "init_args": {"path": str(place / "pairs.jsonl")}}
    recipe = {
        "data": {
            "path": str(place / "data"),
            "source": source,
            "vocab_size": 400,
            "max_length": 64,
            "dev_fraction": 0.2,
            "test_fraction": 0.0,
        },
        "backbone": {"architecture": {**LLAMA, "hidden_size": 16, "num_hidden_layers": 1}},
        "optim": {"learning_rate": 1e-2, "epsilon": 1e-4},
        "train": {
            "ds_config": "tests/ds/zero3.json",
            "batch_pairs": 16,
            "micro_batch_pairs": 4,
            "epochs": 6,
            "log_every": 1,
        },
        **METHODS[method],
    }
    (place / f"{method}.yaml").write_text(json.dumps(recipe))
    for num_ranks in (1, 2):
        run = place / f"{method}_{num_ranks}"
        work = command("train", f"--config={place / method}.yaml", f"--run_dir={run}")
        codes = wait_for(fork_ranks(num_ranks, work, run.with_suffix(".log")), seconds=120)
        assert codes == [0] * num_ranks, run.with_suffix(".log.0").read_text()[-3000:]
        metrics = RunDirectory(run).read_metrics()
        told[str(num_ranks)] = {
            "losses": [row["loss"] for row in metrics if "loss" in row],
            "dev": [row["dev_accuracy"] for row in metrics if "dev_accuracy" in row][-1],
        }
        step = max(RunDirectory(run).complete_steps())
        users = load_file(RunDirectory(run).checkpoint(step) / "users.safetensors")
        told[str(num_ranks)]["users"] = {key: list(rows.shape) for key, rows in users.items()}
    return told


def run_commands(folder: str, lines: list[list[str]]) -> list[dict[str, Any]]:
    """Runs commands one after the other on one rank; exit code and output of each."""
    told = []
    for index, words in enumerate(lines):
        log = Path(folder) / f"command-{words[0]}-{index}.log"
        codes = wait_for(fork_ranks(1, command(*words), log), seconds=120)
        told.append({"code": codes[0], "said": Path(f"{log}.0").read_text()})
    return told
