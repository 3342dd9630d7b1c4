"""Shards read without DeepSpeed equal what DeepSpeed's own tool makes of them; foreign pickles are refused."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pal_ds.engine.checkpoint.shard_reader import ShardedCheckpoint
from pal_ds.engine.checkpoint.torch_archive import load_archive
from pal_ds.errors import UserError
from tests.spawn import run_ranks

VARIANTS = [
    f"stage{stage}_{precision}_{sub_group}_world{world}"
    for stage in range(4)
    for precision in ("fp32", "bf16")
    for sub_group in ((10**9, 40) if stage == 3 else (10**9,))
    for world in (1, 2)
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    for num_ranks in (1, 2):
        run_ranks(num_ranks, "tests.engine.checkpoint.shards_worker", root)
    return root


@pytest.mark.parametrize("name", VARIANTS)
def test_every_tensor_is_the_one_deepspeed_reads(name: str, checkpoints: Path) -> None:
    checkpoint = ShardedCheckpoint(checkpoints / name)
    reference = load_file(checkpoints / name / "reference.safetensors")
    reference.pop("count", None)
    trained = {"first.weight", "first.bias", "second.weight", "second.bias", "scale", "tied.weight"}
    assert set(checkpoint.names) == {*trained, "running"} == set(reference)
    for key, tensor in checkpoint.items():
        assert tensor.dtype is torch.float32
        assert checkpoint.shape(key) == tuple(reference[key].shape)
        assert torch.equal(tensor, reference[key]), key


def test_a_missing_shard_is_named(checkpoints: Path) -> None:
    folder = checkpoints / "stage3_fp32_1000000000_world2"
    shard = next((folder / "engine").glob("*rank_1*optim_states.pt"))
    shard.rename(shard.with_suffix(".away"))
    try:
        with pytest.raises(UserError, match="2 ranks wrote"):
            ShardedCheckpoint(folder)
    finally:
        shard.with_suffix(".away").rename(shard)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_mixed_up_shard_is_refused(checkpoints: Path, stage: int) -> None:
    name = f"stage{stage}_fp32_1000000000"
    one, two = (checkpoints / f"{name}_world{n}" / "engine" for n in (1, 2))
    shard = next(two.glob("*rank_1*optim_states.pt"))
    kept = shard.read_bytes()
    shard.write_bytes(next(one.glob("*rank_0*optim_states.pt")).read_bytes())
    try:
        with pytest.raises(UserError, match="mixed"):
            ShardedCheckpoint(two.parent)
    finally:
        shard.write_bytes(kept)


def test_no_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="model_states"):
        ShardedCheckpoint(tmp_path)


class _Evil:
    def __reduce__(self):
        return os.system, ("echo ran",)


@pytest.mark.parametrize("value", [_Evil(), {"a": Path("/x")}, [pickle.Unpickler]])
def test_foreign_objects_are_refused(value: object, tmp_path: Path) -> None:
    torch.save({"module": value}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="names "):
        load_archive(tmp_path / "x.pt")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", pickle.dumps({"a": 1})])
def test_files_that_are_no_archive_are_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt"):
        load_archive(tmp_path / "x.pt")


def test_tensors_of_any_layout(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 6)
    values = {
        "slice": whole[1:3],
        "transposed": whole.t(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 3),
        "half": whole.bfloat16(),
        "parameter": torch.nn.Parameter(whole.clone()),
    }
    torch.save(values, tmp_path / "x.pt")
    for name, stored in load_archive(tmp_path / "x.pt").items():
        assert torch.equal(stored.read(), values[name]), name
    assert torch.equal(
        load_archive(tmp_path / "x.pt")["slice"].read_flat(2, 5), whole.flatten()[8:13]
    )
