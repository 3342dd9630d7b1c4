"""Long work on files shows progress while bytes flow, which keeps the watchdog from ending it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pal_ds.backbones.loading import weights_fingerprint
from pal_ds.distributed import phase
from pal_ds.engine.checkpoint import shard_writer, torch_archive
from pal_ds.engine.checkpoint.manifest import hash_file
from pal_ds.engine.checkpoint.shard_writer import ShardFiles
from pal_ds.engine.checkpoint.torch_archive import load_archive
from pal_ds.errors import UserError
from pal_ds.io import files

SMALL = 1 << 12
NUM_CHUNKS = 20


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (shard_writer, torch_archive):
        monkeypatch.setattr(module, "CHUNK", SMALL)
    monkeypatch.setattr(files, "CHUNK_BYTES", SMALL)


@pytest.fixture
def values() -> torch.Tensor:
    """One tensor of so many chunks."""
    return torch.arange(SMALL // 4 * NUM_CHUNKS, dtype=torch.float32)


def marks(work: Callable[[], object]) -> int:
    """How often `work` shows progress; it does not seem to come further than a rank with fewer bytes."""
    phase.enter("a test")
    before = phase.current()
    work()
    after = phase.current()
    assert (after.name, after.since, after.num_in_step) == (*before[:1], before.since, before[4])
    return after.num_entered - before.num_entered


def test_writing_and_reading_a_shard(tmp_path: Path, values: torch.Tensor) -> None:
    path = tmp_path / "shard.pt"
    shards = ShardFiles()
    assert marks(lambda: shards.save({"x": values}, str(path))) >= NUM_CHUNKS
    entry = shards.entries(tmp_path)["shard.pt"]
    assert (path.stat().st_size, hash_file(path)) == (entry["size"], entry["xxh3_128"])
    read = []
    assert marks(lambda: read.append(shards.load(str(path)))) >= NUM_CHUNKS
    assert torch.equal(read[0]["x"], values)
    stored = load_archive(path)["x"]
    assert marks(lambda: read.append(stored.read())) >= NUM_CHUNKS
    assert torch.equal(read[1], values)
    assert marks(lambda: hash_file(path)) >= NUM_CHUNKS


def test_a_long_shard_reaches_the_disk_as_it_grows(
    tmp_path: Path, values: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all that the cache took would leave it at the end, with no sign of progress."""
    synced = []
    monkeypatch.setattr(shard_writer, "SYNCED_AT_ONCE", 5 * SMALL)
    monkeypatch.setattr(shard_writer.os, "fsync", synced.append)
    ShardFiles().save({"x": values}, str(tmp_path / "shard.pt"))
    assert 3 <= len(synced) <= 5


def test_a_file_cut_short_is_told(tmp_path: Path, values: torch.Tensor) -> None:
    path = tmp_path / "shard.pt"
    ShardFiles().save({"x": values}, str(path))
    path.write_bytes(path.read_bytes()[:-SMALL])
    with pytest.raises(UserError, match=r"shard\.pt: cannot be read \(.*no torch archive"):
        ShardFiles().load(str(path))


def test_a_fingerprint_of_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    assert marks(lambda: weights_fingerprint(str(tmp_path), None)) == 1
