"""Shards read without DeepSpeed equal what DeepSpeed's own tool makes of them; foreign pickles are refused."""

import collections
import copy
import io
import os
import pickle
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

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


def archive_of(path: Path, program: bytes, records: dict[str, bytes], compressed: bool = False):
    """A torch archive with a pickle of one's own."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("x/data.pkl", program)
        for name, content in records.items():
            archive.writestr(f"x/data/{name}", content)
    return path


def called(name: str, argument: bytes) -> bytes:
    """A pickle of {"x": name(argument)}."""
    return b"\x80\x02}X\x01\x00\x00\x00xc" + name.encode() + b"\n" + argument + b"\x85Rs."


LARGE = b"\x8a\x05" + (8 * 10**9).to_bytes(5, "little")
PROGRAMS = {
    "8 GB of bytearray": called("builtins\nbytearray", LARGE),
    "8 GB of bytes": called("builtins\nbytes", LARGE),
    "a list of a string": called("builtins\nlist", b"X\x03\x00\x00\x00abc"),
    "a set": called("builtins\nset", b"]"),
    "a number of a million digits": called("builtins\nint", b"X\x02\x00\x00\x0099"),
    "Python 2's": called("__builtin__\nbytearray", LARGE),
    "anything of numpy": called("numpy\nzeros", LARGE),
    "anything of deepspeed": called("deepspeed.utils\nlogger", LARGE),
    "a size that is no shape": called("torch\nSize", b"X\x03\x00\x00\x00abc"),
    "bytes of a claimed length": b"\x80\x04\x8e" + (8 * 10**9).to_bytes(8, "little") + b"a.",
    "a bytearray of a claimed length": b"\x80\x05\x96" + (8 * 10**9).to_bytes(8, "little") + b"a.",
    "an extension": b"\x80\x02\x82\x01.",
    "a class by its name on the stack": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "an old class": b"(S'echo ran'\nios\nsystem\n.",
}


@pytest.mark.parametrize("case", PROGRAMS)
def test_nothing_is_called_and_no_memory_taken(case: str, tmp_path: Path) -> None:
    file = archive_of(tmp_path / "x.pt", PROGRAMS[case], {})
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"x\.pt"):
            load_archive(file)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def tensor_of(shape: tuple, stride: tuple, *, offset: int = 0, num_elements: int = 4) -> bytes:
    """A pickle of {"x": a tensor of fp32 in record 0}, as torch writes it."""
    stream = io.BytesIO()

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: object):
            return (
                ("storage", torch.FloatStorage, "0", "cpu", num_elements) if value is MARK else None
            )

        def reducer_override(self, value: object):
            if value is TENSOR:
                arguments = MARK, offset, shape, stride, False, collections.OrderedDict()
                return torch._utils._rebuild_tensor_v2, arguments
            return NotImplemented

    Pickler(stream, 2).dump({"x": TENSOR})
    return stream.getvalue()


MARK, TENSOR = object(), torch.finfo(torch.float32)
BEYOND = {
    "more rows than the record": tensor_of((5,), (1,)),
    "one element, 10^12 times": tensor_of((10**12,), (0,)),
    "rows apart": tensor_of((2, 2), (3, 1)),
    "from beyond its end": tensor_of((1,), (1,), offset=4),
    "a record of more than it has": tensor_of((8,), (1,), num_elements=8),
    "negative": tensor_of((-1,), (1,)),
    "backwards": tensor_of((2,), (-1,), offset=1),
}


@pytest.mark.parametrize("case", BEYOND)
def test_tensors_lie_within_their_record(case: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.pt: cannot be read \(.*no torch archive"):
        load_archive(archive_of(tmp_path / "x.pt", BEYOND[case], {"0": bytes(16)}))


def test_those_that_do_are_read(tmp_path: Path) -> None:
    """Else the ones above could be refused for how they are written."""
    file = archive_of(tmp_path / "x.pt", tensor_of((2, 2), (2, 1)), {"0": bytes(16)})
    assert torch.equal(load_archive(file)["x"].read(), torch.zeros(2, 2))


def test_a_small_file_does_not_unfold(tmp_path: Path) -> None:
    """Neither by compression nor by records that lie over each other."""
    file = archive_of(tmp_path / "x.pt", tensor_of((4,), (1,)), {"0": bytes(16)}, compressed=True)
    with pytest.raises(UserError, match=r"x\.pt: .*compressed"):
        load_archive(file)
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        archive.writestr("x/data.pkl", tensor_of((4,), (1,)))
        archive.writestr("x/data/0", bytes(10**5))
        for number in range(1, 9):
            again = copy.copy(archive.filelist[1])
            again.filename = f"x/data/{number}"
            archive.filelist.append(again)
    with pytest.raises(UserError, match=r"y\.pt: .*9\d{5} bytes, the file"):
        load_archive(tmp_path / "y.pt")


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


def repeated(setup: bytes, step: bytes, count: int = 2000) -> bytes:
    """A pickle of a list: what `setup` makes, kept as number 0, and then `count` times what `step` makes of it."""
    return b"\x80\x02](" + setup + b"q\x00" + step * count + b"e."


_MANY = b"(" + b"K\x01" * 20_000
COPIES = {
    "a shape of 20,000 dimensions": repeated(_MANY + b"t", b"ctorch\nSize\nh\x00\x85R"),
    "a shape from a list": repeated(b"](" + b"K\x01" * 20_000 + b"e", b"ctorch\nSize\nh\x00\x85R"),
    "a mapping from a list": repeated(
        b"](" + b"K\x01K\x02\x86" * 10_000 + b"e", b"ccollections\nOrderedDict\nh\x00\x85R"
    ),
    "arguments of an object": repeated(
        _MANY + b"t", b"cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\nh\x00R"
    ),
    "a number to keep it under": b"\x80\x02]r\x00\x00\x00\x7f.",
}


@pytest.mark.parametrize("case", COPIES)
def test_no_copy_of_a_thing_is_made_each_time_that_it_is_named(case: str, tmp_path: Path) -> None:
    """60 kB would take 320 MB, and a five-byte instruction 34 GB."""
    file = archive_of(tmp_path / "x.pt", COPIES[case], {})
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"x\.pt: cannot be read \(.*no torch archive"):
            load_archive(file)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_state_is_dropped_and_none_reaches_our_functions(tmp_path: Path) -> None:
    """BUILD copies a state into the attributes of what it is given to, and our functions serve all shards."""
    state = b"}(X\x01\x00\x00\x00a" + b"K\x01u"
    mapping = repeated(state, b"ccollections\nOrderedDict\n)Rh\x00b", count=3)
    read: Any = load_archive(archive_of(tmp_path / "x.pt", mapping, {}))
    assert [vars(one) for one in read[1:]] == [{}] * 3
    for name in (b"torch._utils\n_rebuild_tensor_v2", b"torch\nSize", b"collections\nOrderedDict"):
        program = repeated(state, b"c" + name + b"\nh\x00b", count=1)
        with pytest.raises(UserError, match="state for a function"):
            load_archive(archive_of(tmp_path / "y.pt", program, {}))
