"""A tiny backbone and prepared pairs that the tests share: the fixture `tiny_run` of conftest.py."""

from pathlib import Path
from typing import NamedTuple

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}


class TinyRun(NamedTuple):
    """Folders with prepared data (about 50 training pairs, dev pairs too) and a GPT-2 of two layers."""

    data: Path
    base: Path


def make_tiny_run(folder: Path) -> TinyRun:
    """Prepares the pairs and writes the backbone into an empty folder."""
    # Here, as conftest.py imports this file: transformers may import triton before tests/kernels can.
    from pal_ds.backbones.config import BackboneConfig
    from pal_ds.backbones.transformer import materialise_architecture
    from pal_ds.data.prepare import DataConfig, prepare
    from pal_ds.data.sources import Jsonl
    from tests.tiny import write_pairs

    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 64)))
    options = {"max_length": 64, "vocab_size": 400, "dev_fraction": 0.2, "test_fraction": 0}
    data = prepare(DataConfig(path=str(folder / "data"), source=source, **options))
    backbone = BackboneConfig(architecture=GPT2)
    materialise_architecture(backbone, data.info["tokens"]["vocab_size"], 0, folder / "base")
    return TinyRun(folder / "data", folder / "base")
