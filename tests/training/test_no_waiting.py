"""Nothing between a batch and its gradients asks the device for a number: each such question waits for all its work.

For packed batches; for padded ones transformers itself looks, twice a forward, whether a mask masks anything.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.packed import NAME
from pal_ds.backbones.packed_spans import spans_of
from pal_ds.backbones.transformer import TransformerBackbone, architecture_config
from pal_ds.data.batch import Batch
from pal_ds.data.collator import Collator
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.heads import PalA, PalB
from pal_ds.heads.base import UserState
from pal_ds.losses import PreferenceLoss, decision_margin
from pal_ds.model import RewardModel
from tests.backbones.test_packed import by_loops
from tests.tiny import LLAMA, write_pairs

# Operations whose result, or the size of whose result, is a number on the device.
WAITING = {
    f"aten::{name}"
    for name in (
        *("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "bincount"),
        *("_unique", "_unique2", "unique_consecutive", "unique_dim"),
    )
}
READS = ("cpu", "item", "numpy", "tolist", "__bool__", "__int__", "__float__", "__index__")


class Watch(TorchDispatchMode):
    """Collects the names of operations whose result the host needs before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        sizeless = name == "aten::repeat_interleave" and kwargs.get("output_size") is None
        if name in WAITING or sizeless:
            self.seen.append(name)
        return func(*args, **kwargs)


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors refuse to be read from Python."""

    def refuse(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("a tensor is read from Python")

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, refuse)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder: Path = tmp_path_factory.mktemp("no_waiting")
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 20)))
    settings = {"max_length": 80, "vocab_size": 300, "dev_fraction": 0, "test_fraction": 0}
    data = prepare(DataConfig(path=str(folder / "data"), source=source, **settings), quiet=True)
    rows = np.arange(8)
    collator = Collator(data, packed=True, with_prompt=True, scored_positions="all")
    return collator(rows, rows)


@pytest.fixture(scope="module")
def models(batch: Batch) -> dict[str, RewardModel]:
    assert batch.input_ids is not None
    vocabulary = int(batch.input_ids.max()) + 1
    config = architecture_config(BackboneConfig(architecture=LLAMA), vocabulary)
    model = AutoModel.from_config(config, attn_implementation=NAME)
    backbone = TransformerBackbone(model, prompt_tokens=False)
    heads = {"pal_a": PalA(32, num_prototypes=3), "pal_b": PalB(32, num_prototypes=3)}
    return {name: RewardModel(backbone, head).train() for name, head in heads.items()}


def update(model: RewardModel, batch: Batch, loss: PreferenceLoss) -> None:
    leaf = torch.zeros(len(batch.label), 3, requires_grad=True)
    output = model(batch, UserState(leaf))
    facts = (batch.label, batch.window_start, batch.window_end, batch.required_margin)
    loss(output.margin, *facts).mean().backward()
    decision_margin(output.margin, batch.window_end)


@pytest.mark.usefixtures("no_reads")
@pytest.mark.parametrize("weighting", ["last", "mean", "cumulative"])
@pytest.mark.parametrize("head", ["pal_a", "pal_b"])
def test_no_number_is_read_between_batch_and_gradients(
    batch: Batch, models: dict[str, RewardModel], head: str, weighting: Any
) -> None:
    model = models[head]
    with Watch() as watch:
        update(model, batch, PreferenceLoss("logistic", weighting))
    assert not watch.seen


@pytest.mark.usefixtures("no_reads")
def test_index_tensors_for_variable_length_kernels(batch: Batch) -> None:
    assert batch.packing is not None
    with Watch() as watch:
        spans_of(batch.packing, by_loops)
    assert not watch.seen


def test_what_waits_is_noticed() -> None:
    counts = torch.tensor([2, 1])
    with Watch() as watch:
        counts[0].item()
        torch.repeat_interleave(counts)
        torch.repeat_interleave(counts, output_size=3)
        counts.unique()
    names = ["_local_scalar_dense", "repeat_interleave", "_unique2"]
    assert watch.seen == [f"aten::{name}" for name in names]


@pytest.mark.usefixtures("no_reads")
def test_a_tensor_that_is_read_is_noticed() -> None:
    for read in (torch.Tensor.cpu, torch.Tensor.tolist, bool, int):
        with pytest.raises(AssertionError, match="read from Python"):
            read(torch.ones(1))
