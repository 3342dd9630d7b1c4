"""Models that can be no backbone are refused by their config, before anything is prepared."""

import json
from pathlib import Path
from typing import Any

import pytest

from pal_ds import UserError, prepare, train
from tests.tiny import LLAMA, data_keys

HEAD = {"class_path": "PalA", "init_args": {"num_prototypes": 2}}
RULE = "A backbone is a decoder (llama, qwen3, ...) or an encoder (bert, ...)"
UNFIT = {
    "t5": f"t5 is an encoder with a decoder behind it. {RULE}",
    "bart": f"bart is an encoder with a decoder behind it. {RULE}",
    "vit": f"vit reads pixel_values, not token ids. {RULE}",
    "wav2vec2": f"wav2vec2 reads input_values, not token ids. {RULE}",
}
UNKNOWN = {"lama": "model_type is lama, which transformers does not know. Give one", "": "is "}


def refusals(folder: Path, backbone: dict[str, Any]) -> list[str]:
    """What `prepare` and `train` say, which both leave nothing behind."""
    recipe = {"data": data_keys(folder, 30), "backbone": backbone, "head": HEAD}
    before, said = sorted(folder.rglob("*")), []
    for use in (prepare, lambda made: train(made, folder / "run")):
        with pytest.raises(UserError) as refused:
            use(recipe)
        said.append(str(refused.value))
    assert sorted(folder.rglob("*")) == before
    return said


@pytest.mark.parametrize(("model_type", "words"), [*UNFIT.items(), *UNKNOWN.items()])
def test_a_model_that_can_be_no_backbone(tmp_path: Path, model_type: str, words: str) -> None:
    config = {"model_type": model_type}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    for backbone, key in (
        ({"path": str(tmp_path / "model")}, f"{tmp_path}/model/config.json: "),
        ({"architecture": config}, "backbone.architecture: "),
    ):
        for said in refusals(tmp_path, backbone):
            assert words in said and "max_length" not in said
            if model_type in UNKNOWN:
                assert said.startswith(key)


@pytest.mark.parametrize(
    ("content", "words"),
    [('{"hidden_size": 32}', "says no model_type"), ("{", "not valid JSON"), ("[1]", "model_type")],
)
def test_a_config_that_is_none(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(content)
    for said in refusals(tmp_path, {"path": str(tmp_path / "model")}):
        assert words in said and str(tmp_path / "model" / "config.json") in said


@pytest.mark.parametrize("config", [LLAMA, {"model_type": "bert"}, {"model_type": "xlnet"}])
def test_what_can_be_one_is_prepared_for(tmp_path: Path, config: dict[str, Any]) -> None:
    recipe = {"data": data_keys(tmp_path, 30), "backbone": {"architecture": config}, "head": HEAD}
    assert prepare(recipe).info["tokens"] is not None


def test_a_backbone_that_is_not_at_hand_stops_no_preparation(tmp_path: Path) -> None:
    backbone = {"path": "somebody/model-that-is-not-here"}
    assert prepare({"data": data_keys(tmp_path, 30), "backbone": backbone, "head": HEAD})
