"""A tiny suite, and starts of it in forked ranks; for a parent that called `warm_up`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tests.engine.kills import command
from tests.tiny import LLAMA, data_keys
from tests.warm import fork_ranks, kill_at, wait_for

NUM_SEEDS = 2
METHODS: dict[str, Any] = {
    "BTL": {"head": "BradleyTerry"},
    "PAL": {"head": {"class_path": "PalA", "init_args": {"num_prototypes": 2, "num_layers": 1}}},
}


def write_suite(folder: Path, **keys: Any) -> Path:
    """Twelve users in two camps who judge vectors, a third of them held out, and a suite of two methods on them."""
    generator = np.random.default_rng(0)
    camps = 3 * generator.standard_normal((2, 4))
    with open(folder / "pairs.jsonl", "w") as stream:
        for _ in range(40):
            prompt = generator.standard_normal(4).tolist()
            responses = 2 * generator.standard_normal((2, 4))
            for user in range(12):
                first, second = np.linalg.norm(responses - camps[user % 2], axis=1)
                row = {"user_id": f"u{user}", "prompt_features": prompt}
                row |= {"response_features": responses.tolist(), "y": int(np.sign(first - second))}
                stream.write(json.dumps(row) + "\n")
    suite = {
        "data": {
            "path": str(folder / "data"),
            "source": {"class_path": "Jsonl", "init_args": {"path": str(folder / "pairs.jsonl")}},
            "dev_fraction": 0.1,
            "test_fraction": 0.3,
            "unseen_user_fraction": 0.4,
        },
        "optim": {"learning_rate": 3e-2},
        "users": {"learning_rate": 0.1},
        "train": {"ds_config": "zero1", "batch_pairs": 64, "micro_batch_pairs": 32, "epochs": 2},
        "seeds": list(range(NUM_SEEDS)),
        "few_shot": [0, 4],
        "num_draws": 2,
        "methods": METHODS,
        **keys,
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return path


def write_text_suite(folder: str) -> str:
    """Two heads that read texts alike and two that read prompts too, one every token of them; on a frozen decoder."""
    from pal_ds.backbones.config import BackboneConfig
    from pal_ds.backbones.transformer import materialise_architecture

    base, vocab_size = Path(folder, "base"), 400
    materialise_architecture(BackboneConfig(architecture=LLAMA), vocab_size, 0, base)
    aligned = {"num_prototypes": 2, "prompt_position": "aligned"}
    suite = {
        "data": data_keys(Path(folder), 60, dev_fraction=0.1, test_fraction=0.3),
        "backbone": {"path": str(base), "tuning": "frozen"},
        "optim": {"learning_rate": 1e-2},
        "train": {"ds_config": "zero1", "batch_pairs": 16},
        "seeds": [0],
        "methods": {
            "BTL": {"head": "BradleyTerry"},
            "A": {"head": {"class_path": "PalA", "init_args": {"num_prototypes": 2}}},
            "B": {"head": {"class_path": "PalB", "init_args": {"num_prototypes": 2}}},
            "C": {"head": {"class_path": "PalB", "init_args": aligned}},
        },
    }
    path = Path(folder, "text.yaml")
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return str(path)


def start(
    suite: str, out: str, log: str, *words: str, num_ranks: int = 1, kill: list[Any] | None = None
) -> list[int]:
    """Exit statuses of `compare`; `kill` is (rank, moment, occurrence)."""
    hook = kill_at(*kill) if kill else None
    work = command("compare", f"--config={suite}", f"--out={out}", *words)
    return wait_for(fork_ranks(num_ranks, work, Path(log), hook), seconds=120)


def start_two_ranks(suite: str, out: str, log: str, *words: str) -> list[int]:
    return start(suite, out, log, *words, num_ranks=2)


def start_and_kill(suite: str, out: str, log: str, moment: str, occurrence: int) -> list[int]:
    return start(suite, out, log, kill=[0, moment, occurrence])
