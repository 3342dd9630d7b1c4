"""`backbone.num_layers`: the first layers alone, in training, in a cache, in an export, and for a run that goes on."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.loading import load_transformer
from pal_ds.backbones.transformer import materialise_architecture, read_model_config
from pal_ds.config.recipe import load_recipe
from pal_ds.errors import UserError
from pal_ds.export import ExportOptions, export
from pal_ds.inference.load_run import restore
from pal_ds.reward_models import load_reward_model
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.init_from.copy import take_over
from tests.tiny import LLAMA
from tests.warm import WarmParent

BERT = {
    "model_type": "bert",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}


def loaded(path: Path, num_layers: int | None) -> Any:
    config = BackboneConfig(path=str(path), tuning="frozen", num_layers=num_layers)
    return load_transformer(config, precision="fp32", seed=0, gpu=False)[0]


@pytest.mark.parametrize("architecture", [LLAMA, BERT], ids=["llama", "bert"])
def test_states_are_those_behind_the_last_layer_kept(
    architecture: dict[str, Any], tmp_path: Path
) -> None:
    materialise_architecture(BackboneConfig(architecture=architecture), 64, 0, tmp_path)
    rows = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(0))
    whole, cut = loaded(tmp_path, None), loaded(tmp_path, 1)
    with torch.no_grad():
        behind_first = whole(rows, output_hidden_states=True).hidden_states[1]
        # A decoder normalises what leaves its last layer.
        expected = behind_first if architecture is BERT else whole.norm(behind_first)
        assert torch.equal(cut(rows).last_hidden_state, expected)
    assert cut.config.num_hidden_layers == 1
    assert not torch.allclose(expected, whole(rows).last_hidden_state, atol=1e-3)


def test_layers_that_are_left_out_are_not_listed_and_what_is_missing_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    materialise_architecture(BackboneConfig(architecture=LLAMA), 64, 0, tmp_path)
    # transformers' own handler writes to standard error, and hands nothing on.
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    loaded(tmp_path, 1)
    assert not [record for record in caplog.records if record.name.startswith("transformers")]
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n != "norm.weight"}, file, {"format": "pt"})
    loaded(tmp_path, 1)
    assert "norm.weight" in caplog.text


@pytest.fixture(scope="module")
def place(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("num_layers") / "place"
    assert warm("tests.backbones.num_layers_cases:train_on_one_layer", str(folder)) == [0]
    return folder


def test_an_export_holds_the_layers_kept_and_scores_alike(place: Path, tmp_path: Path) -> None:
    """The export compares its own scores with the run's and refuses where they differ."""
    out = tmp_path / "exported"
    export(RunDirectory(place / "run"), out, ExportOptions(quiet=True))
    assert json.loads((out / "config.json").read_text())["text_config"]["num_hidden_layers"] == 1
    assert len(load_reward_model(out).backbone.layers) == 1
    restored: Any = restore(RunDirectory(place / "run")).model
    assert len(restored.backbone.model.layers) == 1


def test_a_run_that_starts_from_it_reads_as_many(place: Path, tmp_path: Path) -> None:
    config = load_recipe(place / "run" / "config.yaml")
    data = restore(RunDirectory(place / "run")).data
    start = replace(config.train, init_from=str(place / "run"))

    def taken(num_layers: int | None) -> Any:
        backbone = replace(config.backbone, path=None, num_layers=num_layers)
        begun = replace(config, train=start, backbone=backbone)
        return take_over(begun, data, RunDirectory(tmp_path / f"from_{num_layers}"))

    with pytest.raises(
        UserError, match=r"would read those behind layer 2\. Set backbone\.num_layers to 1"
    ):
        taken(None)
    parts = taken(1)
    assert read_model_config(parts.backbone).num_hidden_layers == 1


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"num_layers": 3}, "asks for 3 layers, the model has 2"),
        ({"path": None, "architecture": LLAMA, "num_layers": 1}, "says how many layers it has"),
    ],
)
def test_what_cannot_be_is_refused(place: Path, keys: dict[str, Any], reason: str) -> None:
    from pal_ds.modeling.build import assemble

    config = load_recipe(place / "run" / "config.yaml")
    run = RunDirectory(place / "run")
    with pytest.raises(UserError, match=reason):
        assemble(replace(config, backbone=replace(config.backbone, **keys)), restore(run).data, run)


def test_fewer_than_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"backbone\.num_layers is 0"):
        BackboneConfig(num_layers=0)
