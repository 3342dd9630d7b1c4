"""Families whose positions begin behind the padding's, and models that read images beside text."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    Gemma3Config,
    PretrainedConfig,
    Qwen2_5_VLConfig,
)

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.loading import empty_transformer, load_transformer
from pal_ds.backbones.transformer import architecture_config, read_model_config
from pal_ds.errors import UserError
from pal_ds.modeling.lengths import num_positions
from pal_ds.remote_code.encoding import hidden_size_of, hidden_states

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
}
SPECIAL = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
BEHIND = ("mpnet", "camembert", "longformer", "data2vec-text", "xlm-roberta-xl", "xlm-roberta")


@pytest.mark.parametrize("pad_token_id", [1, 3])
@pytest.mark.parametrize("model_type", [*BEHIND, "roberta", "bert", "electra"])
def test_as_many_tokens_as_there_are_positions(model_type: str, pad_token_id: int) -> None:
    """The model reads a text of that length, and not one of a token more."""
    window = {"attention_window": [4, 4]} if model_type == "longformer" else {}
    keys = {
        **TINY,
        **SPECIAL,
        "pad_token_id": pad_token_id,
        "max_position_embeddings": 20,
        **window,
    }
    config = AutoConfig.for_model(model_type, **keys)
    length = num_positions(config)
    assert length is not None and (length == 20) == (model_type in ("bert", "electra"))
    model = AutoModel.from_config(config).eval()
    for extra in (0, 1):
        ids = torch.full((1, length + extra), 5)
        if extra:
            with pytest.raises((IndexError, RuntimeError)):
                model(ids, torch.ones_like(ids))
        else:
            assert model(ids, torch.ones_like(ids)).last_hidden_state.shape[1] == length


def gemma3() -> PretrainedConfig:
    text = {**TINY, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8}
    vision = {**TINY, "hidden_size": 16, "image_size": 28, "patch_size": 14}
    tokens: dict[str, Any] = {"image_token_index": 37, "boi_token_index": 38, "eoi_token_index": 39}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)


def qwen() -> PretrainedConfig:
    sections = {"type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 100.0}
    text = {
        **TINY,
        "num_key_value_heads": 1,
        "rope_parameters": {**sections, "rope_type": "default"},
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2}
    vision |= {"out_hidden_size": 32, "patch_size": 14}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=37)


@pytest.mark.parametrize("make", [gemma3, qwen])
def test_the_text_part_of_a_model_that_reads_images(make: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(make()).eval()
    whole.save_pretrained(tmp_path)
    backbone = BackboneConfig(path=str(tmp_path), attention="eager")
    config = read_model_config(backbone)
    assert config.vocab_size == 40 and hidden_size_of(config) == 32
    assert config.model_type.endswith("_text") and num_positions(config)
    model, _ = load_transformer(backbone, precision="fp32", seed=0, gpu=False)
    assert not [name for name, _ in model.named_parameters() if "vis" in name]
    built = empty_transformer(backbone, "fp32", packed=False)
    assert built.state_dict().keys() == model.state_dict().keys()
    ids = torch.randint(5, 30, (2, 12))
    with torch.no_grad():
        states = hidden_states(model.eval(), ids, torch.ones_like(ids))
        expected = whole.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert torch.allclose(states, expected.last_hidden_state, atol=1e-5)


def test_an_architecture_is_one_of_text() -> None:
    with pytest.raises(
        UserError, match=r"gemma3 reads more than text\. Give its text part, gemma3_t"
    ):
        architecture_config(BackboneConfig(architecture={"model_type": "gemma3"}), 40)
