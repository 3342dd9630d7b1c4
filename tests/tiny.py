"""Tiny data, backbones and recipes that several tests share."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from pal_ds.io.sealed import seal

TOPICS = ("tea", "music", "walking", "chess", "rivers", "bread", "trains", "gardens")

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}


def write_pairs(
    path: Path, num_pairs: int, *, num_users: int = 3, num_prompts: int = 12, seed: int = 0
) -> Path:
    """A JSONL of short readable pairs; users repeat inside every few lines, and some share prompt and responses."""
    generator = np.random.default_rng(seed)
    with open(path, "w") as stream:
        for index in range(num_pairs):
            prompt = int(generator.integers(num_prompts))
            topic = TOPICS[prompt % len(TOPICS)]
            short = f"{topic.capitalize()} is fine {generator.integers(30)}."
            long = f"Well, {topic} is something one could talk about for hours, friend {generator.integers(30)}."
            chosen, rejected = (short, long) if generator.random() < 0.5 else (long, short)
            row: dict[str, Any] = {
                "user_id": f"u{index % num_users}",
                "prompt": f"Tell me about {topic}, part {prompt}.",
            }
            stream.write(json.dumps({**row, "chosen": chosen, "rejected": rejected}) + "\n")
    return path


def change_info(folder: Path, **changes: Any) -> None:
    """Write dataset.json of prepared data again with other values, and with the checksum of these."""
    info = json.loads((folder / "dataset.json").read_text()) | changes
    del info["checksum"]
    (folder / "dataset.json").write_text(seal(info, indent=1))


def data_keys(folder: Path, num_pairs: int, **options: Any) -> dict[str, Any]:
    """The `data` part of a recipe on `num_pairs` tiny pairs, which are written into `folder`."""
    pairs = write_pairs(folder / "pairs.jsonl", num_pairs)
    source = {"class_path": "Jsonl", "init_args": {"path": str(pairs)}}
    sizes = {"vocab_size": 400, "max_length": 64}
    return {"path": str(folder / "data"), "source": source, **sizes, **options}


def data_options(folder: Path, pairs: Path) -> list[str]:
    """Options of a command that prepares tiny pairs in `folder`, with a tokenizer of their own."""
    return [
        f"--data.path={folder / 'data'}",
        "--data.source=Jsonl",
        f"--data.source.path={pairs}",
        "--data.vocab_size=400",
        "--data.max_length=64",
    ]
