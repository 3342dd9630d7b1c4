"""The feature cache in one process: states as in memory, keys that tell backbones apart, damage that is found."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.loading import load_transformer, weights_fingerprint
from pal_ds.backbones.transformer import (
    TransformerBackbone,
    materialise_architecture,
)
from pal_ds.data.collator import Collator
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.feature_cache import shards
from pal_ds.feature_cache.encode import encode_once
from pal_ds.feature_cache.folders import CacheFolder, check_cache_path, describe_states, key_of
from tests.tiny import write_pairs
from tests.tiny_run import GPT2, TinyRun

ALONE = World(0, 1, torch.device("cpu"))
READINGS = {
    "last": {"with_prompt": True},
    "every token": {"with_prompt": True, "scored_positions": "all"},
    "separate": {"with_prompt": True, "encoding": "separate"},
}


class Counting(nn.Module):
    """A backbone, and the distinct rows that it was given."""

    def __init__(self, base: Path, prompt_tokens: bool) -> None:
        super().__init__()
        config = BackboneConfig(path=str(base), tuning="frozen", attention="sdpa")
        model, _ = load_transformer(config, precision="fp32", seed=0, gpu=False)
        self.backbone = TransformerBackbone(model, prompt_tokens=prompt_tokens)
        self.num_rows, self.shapes = 0, set()

    def forward(self, batch: Any) -> Any:
        self.num_rows += len(torch.unique(batch.input_ids, dim=0))
        self.shapes.add(tuple(batch.input_ids.shape))
        return self.backbone(batch)


def folders(cache: Path, collator: Collator, base: Path, **options: Any) -> dict[str, CacheFolder]:
    chosen = {"pooling": "last", "prompt_tokens": True, "precision": "fp32", "gpu": False}
    weights = weights_fingerprint(str(base), None)
    backbone = BackboneConfig(path=str(base), tuning="frozen")
    described = describe_states(backbone, weights, collator, **{**chosen, **options})
    return {
        name: CacheFolder(cache / f"{name}_{key_of(made_from)}", key_of(made_from), made_from)
        for name, made_from in described.items()
    }


def encode(
    collator: Collator, base: Path, cache: Path | None, rows: np.ndarray | None = None
) -> tuple[Collator, Counting]:
    backbone = Counting(base, prompt_tokens=True)
    rows = np.arange(len(collator.data.comparisons)) if rows is None else rows
    caches = None if cache is None else folders(cache, collator, base)
    return encode_once(lambda: backbone, collator, rows, 4, ALONE, caches), backbone


def assert_same_batches(one: Collator, other: Collator, rows: np.ndarray | None = None) -> None:
    """Batches of all comparisons carry equal states, to the bit."""
    rows = np.arange(len(one.data.comparisons)) if rows is None else rows
    for share in np.array_split(rows, 3):
        a, b = (collator(share, np.arange(len(share))) for collator in (one, other))
        for name in ("response_states", "prompt_states", "prompt_length"):
            found, wanted = getattr(a, name), getattr(b, name)
            if one.with_prompt or name == "response_states":
                assert found.dtype == wanted.dtype and torch.equal(found, wanted), name
            else:
                assert found is wanted is None


@pytest.fixture
def data(tiny_run: TinyRun) -> PreparedData:
    return PreparedData.open(tiny_run.data)


@pytest.mark.parametrize("reading", READINGS)
def test_states_are_those_in_memory(
    tiny_run: TinyRun, data: PreparedData, tmp_path: Path, reading: str
) -> None:
    """Whether a text was encoded alone, with others, now or before; in several shards or in one."""
    collator = Collator(data, **READINGS[reading])
    memory, whole = encode(collator, tiny_run.base, None)
    encode(collator, tiny_run.base, tmp_path, np.array([5]))
    encode(collator, tiny_run.base, tmp_path, np.arange(0, 40, 3))
    cached, rest = encode(collator, tiny_run.base, tmp_path)
    assert 0 < rest.num_rows < whole.num_rows
    assert len(list(tmp_path.glob("responses_*/*.safetensors"))) == 3
    assert_same_batches(cached, memory)
    again, nothing = encode(collator, tiny_run.base, tmp_path)
    assert nothing.num_rows == 0
    assert_same_batches(again, memory)


def test_shapes_follow_from_a_text_alone(tiny_run: TinyRun, data: PreparedData) -> None:
    """Else its states would depend on its neighbours in the last bit."""
    collator = Collator(data)
    whole = encode(collator, tiny_run.base, None)[1]
    part = encode(collator, tiny_run.base, None, np.array([3]))[1]
    widths = [{width for _, width in found.shapes} for found in (part, whole)]
    assert widths[0] <= widths[1] <= {32, 64}


def test_a_cache_of_responses_serves_a_head_that_reads_prompts(
    tiny_run: TinyRun, data: PreparedData, tmp_path: Path
) -> None:
    encode(Collator(data), tiny_run.base, tmp_path)
    with_prompts = Collator(data, with_prompt=True)
    cached, _ = encode(with_prompts, tiny_run.base, tmp_path)
    assert len(list(tmp_path.glob("responses_*"))) == len(list(tmp_path.glob("prompts_*"))) == 1
    assert len(list(tmp_path.glob("responses_*/*.safetensors"))) == 1
    assert_same_batches(cached, encode(with_prompts, tiny_run.base, None)[0])


def test_two_datasets_share_texts(tiny_run: TinyRun, data: PreparedData, tmp_path: Path) -> None:
    """The second has the first one's pairs and more of them, in another order of rows."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", 40, seed=7)
    own = write_pairs(tmp_path / "own.jsonl", 64).read_text().splitlines(keepends=True)
    pairs.write_text(pairs.read_text() + "".join(reversed(own)))
    tokenizer = str(tiny_run.data / "tokenizer")
    options = {"max_length": 64, "tokenizer": tokenizer}
    other = prepare(DataConfig(path=str(tmp_path / "data"), source=Jsonl(str(pairs)), **options))
    collator = Collator(other)
    cache = tmp_path / "cache"
    first = encode(Collator(data), tiny_run.base, cache)[1]
    cached, rest = encode(collator, tiny_run.base, cache)
    memory, whole = encode(collator, tiny_run.base, None)
    assert len(list(cache.iterdir())) == 1
    assert first.num_rows > 50 and rest.num_rows == whole.num_rows - first.num_rows
    assert_same_batches(cached, memory)


def test_keys_tell_apart_what_gives_other_states(
    tiny_run: TinyRun, data: PreparedData, tmp_path: Path
) -> None:
    collator = Collator(data)

    def key(base: Path = tiny_run.base, of: Collator = collator, **options: Any) -> str:
        return folders(tmp_path, of, base, **options)["responses"].key

    other_base = tmp_path / "base"
    size = data.info["tokens"]["vocab_size"]
    materialise_architecture(BackboneConfig(architecture=GPT2), size, 1, other_base)
    source = Jsonl(str(write_pairs(tmp_path / "pairs.jsonl", 30, seed=3)))
    other_data = {
        "max_length": {"max_length": 60, "tokenizer": str(tiny_run.data / "tokenizer")},
        "tokenizer": {"max_length": 64, "vocab_size": 300},
        "separator": {"tokenizer": str(tiny_run.data / "tokenizer"), "separator": "\n"},
    }
    keys = {
        "this": key(),
        "weights": key(other_base),
        "precision": key(precision="bf16"),
        "positions": key(of=replace(collator, scored_positions="all")),
        "encoding": key(of=replace(collator, encoding="separate")),
        "pooling": key(pooling="mean"),
    }
    for name, options in other_data.items():
        options = {"max_length": 64, **options}
        made = prepare(DataConfig(path=str(tmp_path / name), source=source, **options))
        keys[name] = key(of=Collator(made))
    assert len(set(keys.values())) == len(keys), keys
    assert key(prompt_tokens=False) == keys["this"]  # of responses alone
    with pytest.raises(UserError, match="Download the model"):
        backbone = BackboneConfig(path="hub/id", tuning="frozen")
        described = {"pooling": "last", "prompt_tokens": False, "precision": "fp32", "gpu": False}
        describe_states(backbone, "hub:hub/id@unknown", collator, **described)


@pytest.mark.parametrize("place", [3, 60, 0.5, -1, "cut"])
def test_a_damaged_shard_is_named_and_made_again(
    tiny_run: TinyRun,
    data: PreparedData,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    place: float | str,
) -> None:
    """One byte of its length, its header, its states; its last; half of the file."""
    collator = Collator(data)
    encode(collator, tiny_run.base, tmp_path, np.arange(10))
    (damaged,) = tmp_path.glob("*/*.safetensors")
    encode(collator, tiny_run.base, tmp_path, np.arange(30))
    content = bytearray(damaged.read_bytes())
    if isinstance(place, str):
        content = content[: len(content) // 2]
    else:
        content[int(place * len(content)) if place == 0.5 else int(place)] ^= 1
    damaged.write_bytes(content)
    cached, backbone = encode(collator, tiny_run.base, tmp_path, np.arange(30))
    assert f"{damaged}: its content does not match" in caplog.text
    assert 5 < backbone.num_rows < 25
    assert_same_batches(cached, encode(collator, tiny_run.base, None)[0], rows=np.arange(30))
    again, backbone = encode(collator, tiny_run.base, tmp_path, np.arange(30))
    assert backbone.num_rows == 0, "what healed the cache was lost"
    assert_same_batches(again, cached, rows=np.arange(30))


def test_each_shard_is_read_once_by_a_process(
    tiny_run: TinyRun, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collator = Collator(data)
    for last in (10, 20, 30, 40):
        encode(collator, tiny_run.base, tmp_path, np.arange(last))
    read: list[str] = []

    def count(path: Path, progress: Callable[[], None]) -> None:
        read.append(path.name)

    monkeypatch.setattr(shards, "_verified", set())
    monkeypatch.setattr(shards, "verify_shard", count)
    for _ in range(3):
        encode(collator, tiny_run.base, tmp_path, np.arange(40))
    assert sorted(read) == sorted(path.name for path in tmp_path.glob("*/*.safetensors"))
    assert len(read) > 2


def test_a_shard_that_another_process_deletes_is_done_without(
    tiny_run: TinyRun, data: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    collator = Collator(data)
    encode(collator, tiny_run.base, tmp_path, np.arange(10))

    def deleted(path: Path, progress: Callable[[], None]) -> None:
        path.unlink()
        raise FileNotFoundError

    with monkeypatch.context() as patched:
        patched.setattr(shards, "_verified", set())
        patched.setattr(shards, "verify_shard", deleted)
        cached, _ = encode(collator, tiny_run.base, tmp_path, np.arange(10))
    assert_same_batches(cached, encode(collator, tiny_run.base, None)[0], rows=np.arange(10))


@pytest.mark.parametrize("path", ["", "a_file", "a_file/below"])
def test_a_cache_that_cannot_be_a_folder(path: str, tmp_path: Path) -> None:
    (tmp_path / "a_file").write_text("")
    with pytest.raises(UserError, match=r"backbone\.cache"):
        check_cache_path(str(tmp_path / path) if path else "")


def test_an_adapter_has_no_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="Merge it"):
        weights_fingerprint(str(tmp_path), None)


def test_a_shard_of_another_key_is_passed_over(
    tiny_run: TinyRun, data: PreparedData, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    collator, every = Collator(data), Collator(data, scored_positions="all")
    encode(every, tiny_run.base, tmp_path)
    (foreign,) = tmp_path.glob("*/*.safetensors")
    own = folders(tmp_path, collator, tiny_run.base)["responses"].path
    foreign.parent.rename(own)
    cached, backbone = encode(collator, tiny_run.base, tmp_path)
    assert "of another backbone or reading" in caplog.text and backbone.num_rows > 50
    assert_same_batches(cached, encode(collator, tiny_run.base, None)[0])


def test_states_stay_on_the_disk(tiny_run: TinyRun, data: PreparedData, tmp_path: Path) -> None:
    cached, _ = encode(Collator(data), tiny_run.base, tmp_path)
    (path,) = tmp_path.glob("*/*.safetensors")
    assert cached.response_store is not None
    mapped = [
        line for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    assert mapped, "the shard is not mapped"


def test_a_stale_temporary_file_goes_and_a_young_one_stays(
    tiny_run: TinyRun, data: PreparedData, tmp_path: Path
) -> None:
    collator = Collator(data)
    folder = folders(tmp_path, collator, tiny_run.base)["responses"].path
    folder.mkdir()
    old, young = (folder / f"x.safetensors.tmp-1-{number}" for number in range(2))
    for path in (old, young):
        path.write_bytes(b"half a shard")
    os.utime(old, (0, 0))
    encode(collator, tiny_run.base, tmp_path)
    assert not old.exists() and young.exists()
