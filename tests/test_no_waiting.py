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
from pal_ds.backbones.packed_attention import NAME
from pal_ds.backbones.packed_spans import spans_of
from pal_ds.backbones.transformer import TransformerBackbone, architecture_config
from pal_ds.data.batch import Batch, Collator
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.heads import PalA, PalB
from pal_ds.heads.base import UserState
from pal_ds.losses import PreferenceLoss, decision_margin
from pal_ds.model import RewardModel
from tests.backbones.test_packed import by_loops
from tests.tiny import LLAMA, write_pairs

WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}


class Watch(TorchDispatchMode):
    """Collects the names of operations whose result the host needs before it can go on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in WAITING:
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Batch:
    folder: Path = tmp_path_factory.mktemp("no_waiting")
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 20)))
    settings = {"max_length": 80, "vocab_size": 300, "dev_fraction": 0, "test_fraction": 0}
    data = prepare(DataConfig(path=str(folder / "data"), source=source, **settings), quiet=True)
    rows = np.arange(8)
    collator = Collator(data, packed=True, with_prompt=True, scored_positions="all")
    return collator(rows, rows)


def model_of(head: type[PalA] | type[PalB], batch: Batch) -> RewardModel:
    assert batch.input_ids is not None
    vocabulary = int(batch.input_ids.max()) + 1
    config = architecture_config(BackboneConfig(architecture=LLAMA), vocabulary)
    model = AutoModel.from_config(config, attn_implementation=NAME)
    backbone = TransformerBackbone(model, pool_mean=False, prompt_tokens=False)
    return RewardModel(backbone, head(32, num_prototypes=3)).train()


def update(model: RewardModel, batch: Batch, loss: PreferenceLoss) -> None:
    leaf = torch.zeros(len(batch.label), 3, requires_grad=True)
    output = model(batch, UserState(leaf))
    facts = (batch.label, batch.window_start, batch.window_end, batch.required_margin)
    loss(output.margin, *facts).mean().backward()
    decision_margin(output.margin, batch.window_end)


@pytest.mark.parametrize("weighting", ["last", "mean", "cumulative"])
@pytest.mark.parametrize("head", [PalA, PalB])
def test_no_number_is_read_between_batch_and_gradients(
    batch: Batch, head: type[PalA] | type[PalB], weighting: Any
) -> None:
    model = model_of(head, batch)
    with Watch() as watch:
        update(model, batch, PreferenceLoss("logistic", weighting))
    assert not watch.seen


def test_index_tensors_for_variable_length_kernels(batch: Batch) -> None:
    assert batch.packing is not None
    with Watch() as watch:
        spans_of(batch.packing, by_loops)
    assert not watch.seen


def test_a_number_that_is_read_is_noticed() -> None:
    with Watch() as watch:
        torch.ones(1).item()
    assert watch.seen == ["aten::_local_scalar_dense"]
