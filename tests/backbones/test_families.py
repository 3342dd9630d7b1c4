"""Every family, full, LoRA and frozen: ZeRO-3 updates on two ranks, resume, consolidate, export."""

import json
from pathlib import Path

import pytest

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.transformer import materialise_architecture
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.export.folder import ExportOptions, export
from pal_ds.runs.run_dir import RunDirectory
from tests.backbones.families import FAMILIES, TUNINGS
from tests.spawn import run_ranks
from tests.tiny import write_pairs

NUM_UPDATES = 5


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 40)))
    settings = {"max_length": 96, "vocab_size": 400, "dev_fraction": 0, "test_fraction": 0}
    data = prepare(DataConfig(path=str(folder / "data"), source=source, **settings), quiet=True)
    tokens = data.info["tokens"]
    for family, architecture in FAMILIES.items():
        base = folder / f"{family}_base"
        materialise_architecture(
            BackboneConfig(architecture={**architecture, "pad_token_id": tokens["pad_token_id"]}),
            tokens["vocab_size"],
            0,
            base,
        )
        for index, tuning in enumerate(TUNINGS):
            write_recipe(folder, family, tuning, "PalA" if index != 1 else "PalB")
    run_ranks(2, "tests.backbones.families_worker", folder, timeout=600)
    return folder


def write_recipe(folder: Path, family: str, tuning: str, head: str) -> None:
    run = folder / f"{family}_{tuning}"
    run.mkdir()
    train = {
        "ds_config": "tests/ds/zero3.json",
        "batch_pairs": 8,
        "micro_batch_pairs": 4,
        "log_every": 1,
    }
    recipe = {
        "data": {"path": str(folder / "data")},
        "head": {"class_path": head, "init_args": {"num_prototypes": 3}},
        "backbone": {"path": str(folder / f"{family}_base"), "tuning": tuning, "lora": {"rank": 4}},
        "optim": {"learning_rate": 3e-3},
        "train": train,
    }
    (run / "config.yaml").write_text(json.dumps(recipe))
    recipe["train"] = {**train, "stop_after": 3}
    (run / "first.yaml").write_text(json.dumps(recipe))


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_trains_resumes_and_exports(runs: Path, family: str, tuning: str) -> None:
    run = RunDirectory(runs / f"{family}_{tuning}")
    rows = run.read_metrics()
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, NUM_UPDATES + 1))
    assert all(row["grad_norm"] > 0 for row in rows if "loss" in row)
    assert run.complete_steps()[-1] == NUM_UPDATES
    facts = export(
        run, runs / "exports" / f"{family}_{tuning}", ExportOptions(user="u1", quiet=True)
    )
    assert facts["num_samples"] > 0
    assert facts["max_difference"] <= 1e-5 * max(1.0, facts["scale"])
