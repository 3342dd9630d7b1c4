"""`loss.lm_weight` in training: the same updates on one rank and on two, padded and packed, tied and apart."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.language import with_language_head
from pal_ds.backbones.transformer import materialise_architecture
from pal_ds.config.run_config import RunConfig
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tables import PreparedData
from pal_ds.engine.checkpoint.shard_reader import ShardedCheckpoint
from pal_ds.errors import UserError
from pal_ds.export import ExportOptions, export
from pal_ds.inference.load_run import restore
from pal_ds.losses import PreferenceLoss
from pal_ds.modeling.build import assemble, load_backbone
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.init_from.copy import take_over
from tests.engine.parity_worker import recipe
from tests.spawn import run_ranks
from tests.tiny import LLAMA, write_pairs
from tests.training.language_worker import CASES, LAST, with_language


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    # 49 pairs in updates of 16: every fourth update holds one pair, so one of two ranks has a stand-in.
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 49)))
    sizes = {"max_length": 64, "vocab_size": 400, "dev_fraction": 0, "test_fraction": 0}
    data = prepare(DataConfig(path=str(folder / "data"), source=source, **sizes), quiet=True)
    for name, tied in (("apart", False), ("tied", True)):
        backbone = BackboneConfig(architecture={**LLAMA, "tie_word_embeddings": tied})
        vocab_size = data.info["tokens"]["vocab_size"]
        materialise_architecture(backbone, vocab_size, 0, folder / name, language=True)
    for num_ranks in (2, 1):
        run_ranks(num_ranks, "tests.training.language_worker", folder)
    return folder


@pytest.mark.parametrize(("base", "tuning"), CASES)
def test_ranks_stages_and_layouts_agree(folder: Path, base: str, tuning: str) -> None:
    one, two = (np.load(folder / f"{base}_{tuning}_{ranks}.npz") for ranks in (1, 2))
    # Half a token's loss of a random model is far above what a comparison costs.
    assert one["loss"][0] > 0.5 * np.log(200)
    assert one["loss"][4] < one["loss"][0] - 0.005 or tuning == "lora"
    for key in ("loss", "norm", "users", "user_gradients"):
        error = np.abs(one[key] - two[key]).max() / np.abs(one[key]).max()
        assert error <= 2e-5, f"{key} is off by {error:.2g} of its largest entry"


def test_another_world_size_goes_on_with_a_tied_layer(folder: Path) -> None:
    whole, moved = (
        ShardedCheckpoint(RunDirectory(folder / f"tied_{name}").checkpoint(LAST))
        for name in ("whole", "moved")
    )
    assert sorted(whole.names) == sorted(moved.names)
    assert "backbone.language.weight" in whole.names
    for name in whole.names:
        a, b = whole.tensor(name), moved.tensor(name)
        assert (a - b).abs().max() <= 1e-5 * a.abs().max(), name


@pytest.mark.parametrize("base", ["apart", "tied"])
def test_scores_need_no_output_layer(folder: Path, base: str, tmp_path: Path) -> None:
    run = RunDirectory(folder / f"{base}_whole")
    names = [name for name, _ in restore(run).model.named_parameters()]
    assert not any("language" in name for name in names)
    facts = export(run, tmp_path / "out", ExportOptions(quiet=True))
    assert facts["max_difference"] <= 1e-5 * facts["scale"]


def test_the_output_layer_goes_on_with_the_backbone(folder: Path, tmp_path: Path) -> None:
    """Trained and apart, or tied: a stage that starts from the run has it, and can read the base alone."""
    data = PreparedData.open(folder / "data")
    for base in ("apart", "tied"):
        first = RunDirectory(tmp_path / base)
        config = with_language(folder, base, "full", many=False)
        origin = RunDirectory(folder / f"{base}_whole")
        config = replace(
            config,
            backbone=replace(config.backbone, path=None),
            train=replace(config.train, init_from=str(origin.path)),
        )
        assert take_over(config, data, first, trust=False)
        model, output = with_language_head(first.initial_backbone())
        checkpoint = ShardedCheckpoint(origin.checkpoint(LAST))
        assert torch.equal(output.weight, checkpoint.tensor("backbone.language.weight"))
        embedding = checkpoint.tensor("backbone.model.embed_tokens.weight")
        assert torch.equal(model.embed_tokens.weight, embedding)
        assert torch.equal(output.weight, embedding) == (base == "tied")
        base_alone = AutoModel.from_pretrained(first.initial_backbone())
        assert torch.equal(base_alone.embed_tokens.weight, embedding)


def loaded(config: RunConfig, folder: Path) -> Any:
    parts = assemble(config, PreparedData.open(config.data.path), RunDirectory(folder / "new"))
    return load_backbone(parts, config, gpu=False, language=config.loss.lm_weight > 0), parts


def test_weight_zero_builds_no_output_layer(folder: Path) -> None:
    config = recipe(str(folder / "data"), str(folder / "apart"), "full", 0)
    backbone, parts = loaded(config, folder)
    assert backbone.language is None and not parts.collator.with_answers
    vocab_size = backbone.model.config.vocab_size
    assert [name for name, p in backbone.named_parameters() if vocab_size in p.shape] == [
        "model.embed_tokens.weight"
    ]
    backbone, parts = loaded(with_language(folder, "apart", "full", many=False), folder)
    assert backbone.language is not None and parts.collator.with_answers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tuning": "frozen"},
            "loss.lm_weight: a frozen backbone cannot learn from it. Set backbo",
        ),
        (
            {"encoding": "separate"},
            "loss.lm_weight: backbone.encoding: separate reads the response",
        ),
        (
            {"path": None, "architecture": {"model_type": "bert", "hidden_size": 24}},
            "loss.lm_weight: bert is not among the decoders it is known for: cohere, ",
        ),
    ],
)
def test_what_has_no_language_model_is_refused(folder: Path, change: Any, message: str) -> None:
    config = with_language(folder, "apart", "full", many=False)
    config = replace(config, backbone=replace(config.backbone, packing="auto", **change))
    with pytest.raises(UserError) as refusal:
        loaded(config, folder)
    assert message in str(refusal.value)


def test_a_weight_below_zero_is_refused() -> None:
    with pytest.raises(UserError, match=r"loss\.lm_weight is -1.0; it must be 0 or more"):
        PreferenceLoss(lm_weight=-1.0)
