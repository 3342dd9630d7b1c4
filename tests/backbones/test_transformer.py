"""Loading a backbone: what the recipe asks for is what comes back."""

from pathlib import Path

import pytest

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.loading import load_transformer
from pal_ds.backbones.transformer import (
    choose_attention,
    materialise_architecture,
)
from tests.tiny import LLAMA


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder: Path = tmp_path_factory.mktemp("transformer") / "base"
    materialise_architecture(BackboneConfig(architecture=LLAMA), 64, 0, folder)
    return str(folder)


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("wanted", [True, False])
def test_activation_checkpointing_is_on_where_asked(base: str, tuning: str, wanted: bool) -> None:
    config = BackboneConfig(path=base, tuning=tuning, gradient_checkpointing=wanted)
    model, _ = load_transformer(config, precision="fp32", seed=0, gpu=False)
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    assert layers
    assert any(layer.gradient_checkpointing for layer in layers) == wanted


def test_frozen_weights_ask_for_no_gradient(base: str) -> None:
    model, _ = load_transformer(
        BackboneConfig(path=base, tuning="frozen"),
        precision="fp32",
        seed=0,
        gpu=False,
        packed=False,
    )
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_attention_falls_back_with_a_reason() -> None:
    assert choose_attention("auto", "bf16", gpu=False) == ("sdpa", "no GPU")
    assert choose_attention("auto", "fp32", gpu=True)[0] == "sdpa"
    assert choose_attention("eager", "bf16", gpu=True)[0] == "eager"
