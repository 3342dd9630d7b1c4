"""A run that stops and starts again is, bit for bit, the run that never stopped."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.transformer import materialise_architecture
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.engine.checkpoint import newest_intact, verify_checkpoint
from pal_ds.errors import UserError
from pal_ds.run_dir import RunDirectory
from tests.engine.resume_worker import NUM_UPDATES, STOPS
from tests.spawn import run_ranks
from tests.tiny import write_pairs

GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 64)))
    data = prepare(
        DataConfig(
            path=str(folder / "data"),
            source=source,
            max_length=64,
            vocab_size=400,
            dev_fraction=0.2,
            test_fraction=0,
        )
    )
    backbone = BackboneConfig(architecture=GPT2)
    materialise_architecture(backbone, data.info["tokens"]["vocab_size"], 0, folder / "base")
    run_ranks(2, "tests.engine.resume_worker", folder / "data", folder / "base", folder)
    return folder


def figures(run: Path) -> list[dict]:
    """metrics.jsonl without what a clock wrote."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "pairs_per_second"} for row in rows]


@pytest.mark.parametrize(
    ("tuning", "stop"), [(tuning, stop) for tuning, stops in STOPS.items() for stop in stops]
)
def test_stopped_run_equals_whole_run(runs: Path, tuning: str, stop: int) -> None:
    whole, stopped = runs / f"{tuning}_whole", runs / f"{tuning}_stopped_{stop}"
    last = f"checkpoints/step_{NUM_UPDATES:08d}"
    wanted = verify_checkpoint(whole / last)
    found = verify_checkpoint(stopped / last)
    assert found["files"].keys() == wanted["files"].keys()
    num_tensors = 0
    for name in wanted["files"]:
        if name.endswith("optim_states.pt"):
            pairs = list(leaves(load(whole / last / name), load(stopped / last / name)))
            num_tensors += sum(isinstance(a, torch.Tensor) for a, _ in pairs)
            assert all(
                torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs
            ), name
    # fp32 weights, two moments and a step count per parameter group, on both ranks.
    assert num_tensors >= 8
    for key, rows in load_file(whole / last / "users.safetensors").items():
        assert torch.equal(rows, load_file(stopped / last / "users.safetensors")[key]), key
    assert figures(stopped) == figures(whole)


def load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


def leaves(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
    """Tensors and numbers at the same place of two nested states."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            yield from leaves(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            yield from leaves(x, y)
    elif isinstance(a, torch.Tensor | int | float):
        yield a, b


@pytest.mark.parametrize("without", ["dropout", "gumbel"])
def test_noise_and_dropout_are_at_work(runs: Path, without: str) -> None:
    """Else the equalities above would say nothing of noise after a resume."""
    first = figures(runs / "full_whole")[0]["loss"]
    assert first != figures(runs / f"full_no_{without}")[0]["loss"]


def test_retention_keeps_the_newest_and_the_best(runs: Path) -> None:
    run = RunDirectory(runs / "full_whole")
    best = run.pointer("best")
    assert best is not None
    assert set(run.complete_steps()) == {NUM_UPDATES, best["step"], *run.complete_steps()[-2:]}
    assert run.pointer("latest") == {
        "step": NUM_UPDATES,
        "path": f"checkpoints/step_{NUM_UPDATES:08d}",
    }


def test_damage_is_named(runs: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs / "lora_whole", tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    newest = run.checkpoint(NUM_UPDATES)
    (newest / "users.arrow").unlink()
    with pytest.raises(UserError, match=r"users\.arrow: named in the manifest but missing"):
        verify_checkpoint(newest)
    found = newest_intact(run)
    assert found is not None
    assert found[0] != newest
