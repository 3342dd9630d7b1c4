"""Fills feature caches from ranks that are killed, stopped or refused, for test_embed; runs in a warm parent."""

import json
import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.transformer import materialise_architecture
from pal_ds.data.tables import PreparedData
from pal_ds.engine.checkpoint.shard_reader import ShardedCheckpoint
from pal_ds.feature_cache import keepers
from pal_ds.feature_cache.shards import Shard, verify_shard
from tests.engine.checkpoint.storage_cases import at, no_file_longer_than
from tests.engine.kills import command, said
from tests.same_run import figures
from tests.tiny import data_keys
from tests.tiny_run import GPT2
from tests.warm import Hook, fork_ranks, kill_at, wait_for

HEAD = {"class_path": "PalB", "init_args": {"num_prototypes": 3}}
ENCODING = "update: encoding responses"


def make_place(folder: str) -> None:
    """Prepared data with all splits, a GPT-2 of two layers, and a recipe that reads prompts, too."""
    place = Path(folder)
    place.mkdir(exist_ok=True)
    data = data_keys(place, 64, dev_fraction=0.2, test_fraction=0.2)
    recipe = {
        "data": data,
        "head": HEAD,
        "backbone": {"path": str(place / "base"), "tuning": "frozen", "encode_batch_texts": 4},
        "optim": {"learning_rate": 3e-3},
        "train": {
            "ds_config": "tests/ds/zero3.json",
            "batch_pairs": 16,
            "micro_batch_pairs": 4,
            "log_every": 1,
            "epochs": 2,
        },
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    command("prepare", f"--config={place / 'recipe.yaml'}")()
    vocab_size = PreparedData.open(place / "data").info["tokens"]["vocab_size"]
    backbone = BackboneConfig(architecture=GPT2)
    materialise_architecture(backbone, vocab_size, 0, place / "base")


def start(
    folder: str,
    num_ranks: int,
    *words: object,
    name: str = "embed",
    hook: Hook | None = None,
    shard_bytes: int = 600,
) -> dict[str, Any]:
    """Runs a command on forked ranks; exit codes, output of each, what was to encode, and the phases of rank 0."""
    log = Path(folder) / f"{name}-{time.monotonic_ns()}.log"
    run = command(words[0], f"--config={folder}/recipe.yaml", *words[1:])
    phases = Path(f"{log}.phases")

    def noted(number: int, moment: str) -> None:
        if number == 0:
            with open(phases, "a") as stream:
                stream.write(moment + "\n")
        if hook is not None:
            hook(number, moment)

    def work() -> None:
        keepers.SHARD_BYTES = shard_bytes
        run()

    codes = wait_for(fork_ranks(num_ranks, work, log, noted), seconds=120, grace=20)
    output = said(log, num_ranks)
    found = re.findall(r"(\d+) of the (\d+) that are read", output[0])
    return {
        "codes": codes,
        "said": output,
        "to_encode": [int(lacking) for lacking, _ in found],
        "read": [int(read) for _, read in found],
        "phases": phases.read_text().splitlines() if phases.is_file() else [],
    }


def contents(cache: str) -> dict[str, dict[str, Any]]:
    """By folder: states by address, how often an address is stored, and what is no whole shard."""
    result: dict[str, dict[str, Any]] = {}
    for folder in sorted(Path(cache).glob("*_*")):
        states: dict[str, Any] = {}
        num_stored = 0
        for path in sorted(folder.glob("*.safetensors")):
            verify_shard(path, lambda: None)
            shard = Shard.map(path)
            num_stored += len(shard.lengths)
            parts = shard.values.split(shard.lengths.tolist())
            for address, part in zip(shard.addresses.tolist(), parts, strict=True):
                states[str(address)] = part
        left = [path.name for path in folder.iterdir() if path.suffix != ".safetensors"]
        result[folder.name] = {"states": states, "num_stored": num_stored, "left": left}
    return result


def same(one: str, other: str) -> int:
    """Compares two caches to the bit; the number of states."""
    a, b = contents(one), contents(other)
    assert a.keys() == b.keys() and len(a) == 2, (a.keys(), b.keys())
    num_states = 0
    for name, content in a.items():
        assert content["states"].keys() == b[name]["states"].keys()
        for address, states in content["states"].items():
            assert torch.equal(states, b[name]["states"][address])
            num_states += 1
    return num_states


def train_from_memory_and_cache(folder: str) -> dict[str, Any]:
    """One run in memory, one from what `embed` wrote, one that fills a cache of its own; two ranks each."""
    told: dict[str, Any] = {"memory": start(folder, 2, "train", f"--run_dir={folder}/memory")}
    told["embed"] = start(folder, 2, "embed", f"--backbone.cache={folder}/whole")
    for name, cache in (("cached", "whole"), ("filling", "own")):
        words = [f"--run_dir={folder}/{name}", f"--backbone.cache={folder}/{cache}"]
        told[name] = start(folder, 2, "train", *words)
    told["again"] = start(folder, 1, "embed", f"--backbone.cache={folder}/whole")
    steps = sorted(path.name for path in Path(folder, "memory", "checkpoints").iterdir())
    told["num_tensors"] = 0
    for name in ("cached", "filling"):
        assert figures(Path(folder, name)) == figures(Path(folder, "memory"))
        for step in steps:
            parts = [Path(folder, run, "checkpoints", step) for run in ("memory", name)]
            told["num_tensors"] += assert_same_tensors(*parts)
    return told


def assert_same_tensors(one: Path, other: Path) -> int:
    """Weights and user rows with their moments; `same_run` would compare ZeRO's uninitialised padding, too."""
    weights = [ShardedCheckpoint(path) for path in (one, other)]
    users = [load_file(path / "users.safetensors") for path in (one, other)]
    assert weights[0].names == weights[1].names
    for name in weights[0].names:
        assert torch.equal(weights[0].tensor(name), weights[1].tensor(name)), name
    for name, rows in users[0].items():
        assert torch.equal(rows, users[1][name]), name
    return len(weights[0].names) + len(users[0])


def killed(folder: str, seed: int) -> dict[str, Any]:
    """One rank is killed in a shard, then the second of two, then one in a random batch; then two come to the end."""
    cache = f"--backbone.cache={folder}/killed"
    # By count, not by the clock: a fast machine would be done before any time that leaves a slow one at work.
    batch = random.Random(seed).randint(1, 4)
    kills = [
        (1, kill_at(0, "inside a state shard", 3)),
        (2, kill_at(1, "state shard written", 2)),
        (2, kill_at(0, ENCODING, batch)),
    ]
    told = []
    for num_ranks, hook in kills:
        told.append(start(folder, num_ranks, "embed", cache, hook=hook))
        held = contents(f"{folder}/killed").values()
        told[-1]["held"] = [len(part["states"]) for part in held]
    told.append(start(folder, 2, "embed", cache))
    return {"starts": told, "num_states": same(f"{folder}/whole", f"{folder}/killed")}


def refused_and_stopped(folder: str) -> dict[str, Any]:
    """One rank's files may not grow any more; a signal reaches one rank; two processes fill one cache at once."""
    full = f"--backbone.cache={folder}/full"
    refusal = at("shard begins", 1, 3, lambda: no_file_longer_than(500))
    told = {"full": start(folder, 2, "embed", full, hook=refusal)}
    told["full"]["held"] = [part["num_stored"] for part in contents(f"{folder}/full").values()]
    stop = at(ENCODING, 1, 4, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    told["stopped"] = start(folder, 2, "embed", full, hook=stop, shard_bytes=1 << 20)
    told["stopped"]["held"] = [part["num_stored"] for part in contents(f"{folder}/full").values()]
    told["end"] = start(folder, 1, "embed", full)
    return {**told, "num_states": same(f"{folder}/whole", f"{folder}/full")}


def stopped_in_start(folder: str, cached: bool) -> dict[str, Any]:
    """A training of two ranks, one of which is told to stop while texts are encoded; then its second start."""
    run, cache = Path(folder, f"stopped_{cached}"), f"{folder}/stopped_cache"
    words = ["train", f"--run_dir={run}", *([f"--backbone.cache={cache}"] if cached else [])]
    stop = at(ENCODING, 1, 4, lambda: os.kill(os.getpid(), signal.SIGUSR2))
    told: dict[str, Any] = {"stopped": start(folder, 2, *words, hook=stop, shard_bytes=1 << 20)}
    told["status"] = json.loads((run / "status.json").read_text())
    held = [part["num_stored"] for part in contents(cache).values()] if cached else [0]
    assert len(set(held)) == 1, held
    told["held"] = held[0]
    told["end"] = start(folder, 2, *words)
    told["finished"] = json.loads((run / "status.json").read_text())
    assert figures(run) == figures(Path(folder, "memory"))
    told["num_tensors"] = 0
    for step in sorted(path.name for path in Path(folder, "memory", "checkpoints").iterdir()):
        parts = [Path(folder, name, "checkpoints", step) for name in ("memory", run)]
        told["num_tensors"] += assert_same_tensors(*parts)
    return told


def out_of_time_in_start(folder: str, cached: bool) -> dict[str, Any]:
    """A training whose time is up when its first text is to be encoded."""
    run = Path(folder, f"late_{cached}")
    words = ["train", f"--run_dir={run}", "--train.time_limit_minutes=0.01"]
    words += [f"--backbone.cache={folder}/late_cache"] if cached else []
    told = start(folder, 2, *words)
    return {**told, "status": json.loads((run / "status.json").read_text())}


def two_at_once(folder: str) -> dict[str, Any]:
    """Two worlds of one rank into one cache."""
    run = command("embed", f"--config={folder}/recipe.yaml", f"--backbone.cache={folder}/both")

    def work() -> None:
        keepers.SHARD_BYTES = 600
        run()

    ranks = [fork_ranks(1, work, Path(folder, f"both{number}.log"))[0] for number in range(2)]
    codes = wait_for(ranks, seconds=120, grace=20)
    left = [part["left"] for part in contents(f"{folder}/both").values()]
    return {"codes": codes, "num_states": same(f"{folder}/whole", f"{folder}/both"), "left": left}


def evaluate_without_weights(folder: str) -> dict[str, Any]:
    """`evaluate` of the run from the cache, where no weights can be loaded; beside the run in memory."""
    from pal_ds.distributed.world import World
    from pal_ds.eval.evaluate import evaluate_run
    from pal_ds.inference import load_run
    from pal_ds.runs.run_dir import RunDirectory

    alone = World(0, 1, torch.device("cpu"))
    expected = evaluate_run(RunDirectory(f"{folder}/memory"), alone)
    load = load_run.load_backbone

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    load_run.load_backbone = refuse
    try:
        found = evaluate_run(RunDirectory(f"{folder}/cached"), alone)
    finally:
        load_run.load_backbone = load
    return {"equal": found == expected, "pairs": found["pairs"]}


def refuse_vectors(folder: str) -> dict[str, Any]:
    """`embed` of records that are vectors."""
    place = Path(folder) / "vectors"
    place.mkdir()
    row = {"user_id": "a", "response_features": [[0.1, 0.7], [0.4, 0.2]], "y": -1}
    (place / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    recipe = {
        "data": {
            "path": str(place / "data"),
            "source": {"class_path": "Jsonl", "init_args": {"path": str(place / "pairs.jsonl")}},
        },
        "head": {"class_path": "PalA", "init_args": {"num_prototypes": 2}},
        "backbone": {"path": "nowhere", "tuning": "frozen", "cache": str(place / "cache")},
        "train": {"ds_config": "tests/ds/zero0.json"},
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))
    return start(str(place), 1, "embed")
