"""The eight readers: valid files for each, how they are read, and which damage their format can notice."""

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pal_ds.config.recipe import load_recipe, read_recipe
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import HuggingFace, Jsonl
from pal_ds.data.tables import PreparedData
from pal_ds.data.tokenise import TextEncoder
from pal_ds.data.verification import verify_content
from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.manifest import read_manifest
from pal_ds.engine.checkpoint.shard_reader import ShardedCheckpoint
from pal_ds.engine.checkpoint.torch_archive import StoredTensor, load_archive
from pal_ds.export.contents import MARKS_VARIABLE, sha256_of, verify_export, write_facts
from pal_ds.feature_cache.shards import FeatureIndex, Shard, pack_shard, shard_name, verify_shard
from pal_ds.inference.text_rows import read_rows
from pal_ds.io.sealed import hash_of
from pal_ds.reward_models import load_reward_model
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable
from tests.artefacts.test_read import HERE
from tests.tiny import change_info, write_pairs

KEPT = HERE / "kept"
ALONE = World(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Target:
    """A reader of a folder's files."""

    make: Callable[[Path], None]
    """Writes valid files into an empty folder."""
    read: Callable[[Path], object]
    """Reads them; what it returns is compared by its text."""
    damaged: Callable[[Path], list[str]]
    """Names of the files that are damaged, one at a time."""
    seal: Callable[[Path, str], Path | None] | None = None
    """Makes the hashes of a damaged file right again; None where the format has none, so that damage may pass."""


def plain(value: Any) -> object:
    """A value as text that tells it from others: arrays and tensors by their bytes."""
    if isinstance(value, torch.Tensor):
        value = (
            value.detach().contiguous().view(torch.uint8).numpy()
            if value.numel()
            else value.numpy()
        )
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, dict):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, StoredTensor):
        return plain(value.read())
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return str(value)


def every_file(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# Records ------------------------------------------------------------------------------------------------------------
CSV = (
    "user_id,prompt,chosen,rejected,margin,seen\n"
    'u1,p,"yes, it\nis",no,0.5,true\nu2,"p ""q""",a,b,,\n' + "u3,p,yes,no,1,false\n" * 4
)


def make_records(folder: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"user_id": "u1", "prompt": "p", "chosen": "yes", "rejected": "no", "margin": 0.5},
        {
            "user_id": 7,
            "prompt": "p",
            "response_1": "a",
            "response_2": "b",
            "y": -1,
            "split": "dev",
        },
        {"prompt": "p", "responses": ["a", "b", "c"], "scores": [1, 2.5, 2], "group": "g"},
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "p"}]}],
            "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}],
            "rejected": [{"role": "assistant", "content": "no", "reasoning_content": "hm"}],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
    ]
    vectors = [{"response_features": [[0.5, 1], [2, 3]], "y": 1, "prompt_features": [1, 2]}] * 3
    texts = [{"prompt": "p", "response": "a", "user_id": "u"}, {"text": "x", "id": 1}] * 2
    for name, lines in (("pairs", rows * 3), ("vectors", vectors), ("texts", texts)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "pairs.json").write_text(json.dumps(rows[:2] * 3))
    (folder / "pairs.csv").write_text(CSV)


def read_records(folder: Path) -> object:
    found = []
    for name in ("pairs.jsonl", "vectors.jsonl"):
        found.append(list(Jsonl(str(folder / name)).records()))
    for name in ("pairs.csv", "pairs.json"):
        found.append(list(HuggingFace(str(folder / name)).records()))
    found.append(read_rows(folder / "texts.jsonl"))
    return found


# Prepared data ------------------------------------------------------------------------------------------------------
def make_prepared(folder: Path) -> None:
    source = Jsonl(str(write_pairs(folder.parent / "pairs.jsonl", 12)))
    prepare(DataConfig(path=str(folder), source=source, vocab_size=270, max_length=64), quiet=True)


def read_prepared(folder: Path) -> object:
    data = PreparedData.open(folder)
    verify_content(folder, data.info, ALONE)
    TextEncoder.from_info(data.info["tokens"], data.tokenizer_path).render("a", "b")
    rows = [data.rows(split) for split in ("train", "dev", "test")]
    tables = [data.comparisons, data.response_prompt, data.prompt_hashes(), data.user_seen]
    texts = [data.responses[row] for row in range(len(data.responses))] if data.responses else []
    return plain([data.hash, data.groups, rows, tables, texts, list(data.users), data.user_group])


def seal_prepared(folder: Path, name: str) -> None:
    """Lists the damaged file with its own hash; of dataset.json the checksum is made anew."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        info = json.loads((folder / "dataset.json").read_text())
        if name != "dataset.json":
            entry = {"size": (folder / name).stat().st_size, "xxh3_128": hash_of(folder / name)}
            info["files"][name] = entry
        change_info(folder, **info)


# Users, recipes, runs -----------------------------------------------------------------------------------------------
def make_users(folder: Path) -> None:
    for name in ("users.arrow", "users.safetensors"):
        shutil.copy(KEPT / "runs" / "pal_a" / "checkpoints" / "step_00000009" / name, folder)


def read_users(folder: Path) -> object:
    table = UserTable.load(folder)
    rows = table.rows(list(table.ids))
    return plain([list(table.ids), rows, table.mixtures(), table.step, table.seen])


def make_recipe(folder: Path) -> None:
    for name in ("recipe.yaml", "pal_b.yaml"):
        shutil.copy(KEPT / name, folder)
    shutil.copy(KEPT / "runs" / "pal_b" / "config.yaml", folder / "config.yaml")


def read_recipes(folder: Path) -> object:
    layers = [f"--config={folder / name}" for name in ("recipe.yaml", "pal_b.yaml")]
    config, text = read_recipe(layers)
    return [text, config, load_recipe(folder / "config.yaml")]


def make_run(folder: Path) -> None:
    shutil.copytree(KEPT / "runs" / "pal_a", folder, dirs_exist_ok=True)
    origin = {
        "kind": "run",
        "step": 3,
        "hash": "x",
        "path": "x",
        "frozen_path": None,
        "head": "PalA",
    }
    (folder / "init").mkdir()
    (folder / "init" / "origin.json").write_text(json.dumps({**origin, "users": 2}))


SMALL = ("status.json", "latest.json", "best.json", "metrics.jsonl", "init/origin.json")
MANIFEST = "checkpoints/step_00000009/manifest.json"


def read_run(folder: Path) -> object:
    run = RunDirectory(folder)
    found = [run.status(), run.origin_facts(), run.initial_backbone(), run.read_metrics()]
    run.drop_metrics_after(5, owes_evaluation=True)
    steps = [run.resolve_step(step) for step in ("latest", "best", "9")]
    return [found, steps, read_manifest(run.checkpoint(9))]


# Exports ------------------------------------------------------------------------------------------------------------
def make_export(folder: Path) -> None:
    shutil.copytree(KEPT / "exported" / "pal_b", folder, dirs_exist_ok=True)
    facts = json.loads((folder / "export.json").read_text())
    del facts["sha256"]
    (folder / "export.json").unlink()
    write_facts(folder, {**facts, "format_version": 2})


def read_export(folder: Path) -> object:
    os.environ[MARKS_VARIABLE] = str(folder.parent / "marks")
    facts = verify_export(folder, whole=True)
    model = load_reward_model(folder)
    return plain([facts["mixture"], facts["tokens"], dict(model.state_dict())])


def seal_export(folder: Path, name: str) -> None:
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        facts = json.loads((folder / "export.json").read_text())
        hashes = facts.pop("sha256")
        if name != "export.json":
            hashes[name] = sha256_of(folder / name)
        write_facts(folder, facts)


# Shards and caches --------------------------------------------------------------------------------------------------
def make_shards(folder: Path) -> None:
    shutil.copytree(
        KEPT / "runs" / "pal_a" / "checkpoints" / "step_00000009" / "engine", folder / "engine"
    )


def read_shards(folder: Path) -> object:
    contents = [load_archive(file) for file in sorted((folder / "engine").iterdir())]
    checkpoint = ShardedCheckpoint(folder)
    moments = [checkpoint.tensor(name, "exp_avg") for name in checkpoint.trained]
    return plain([len(contents), dict(checkpoint.items()), moments, checkpoint.param_groups])


def make_cache(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(n, 4, generator=generator) for n in (3, 1, 2)]
    content = pack_shard("k", [bytes([n]) * 16 for n in range(3)], states)
    (folder / shard_name(content)).write_bytes(content)


def read_cache(folder: Path) -> object:
    found = []
    for file in sorted(folder.iterdir()):
        verify_shard(file, lambda: None)
        shard = Shard.map(file)
        index = FeatureIndex([shard])
        rows = np.arange(len(index))
        store = index.store(rows, rows, len(index))
        found += [shard.key, shard.addresses, shard.lengths, shard.values, store is None]
    return plain(found)


def seal_cache(folder: Path, name: str) -> None:
    (folder / name).rename(folder / shard_name((folder / name).read_bytes()))


def nothing(folder: Path, name: str) -> None:
    """What has a hash is refused, as nobody makes it right."""


TARGETS = {
    "records": Target(make_records, read_records, every_file),
    "prepared": Target(make_prepared, read_prepared, every_file, seal_prepared),
    "users": Target(make_users, read_users, every_file),
    "recipes": Target(make_recipe, read_recipes, every_file),
    "run": Target(make_run, read_run, lambda folder: [*SMALL, MANIFEST]),
    "export": Target(make_export, read_export, every_file, seal_export),
    "shards": Target(make_shards, read_shards, every_file),
    "cache": Target(make_cache, read_cache, every_file, seal_cache),
}


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Warnings of what is passed over are right, and too many to be read."""
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)
