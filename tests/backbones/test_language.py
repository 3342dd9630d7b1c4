"""The language-model loss of preferred answers against transformers' own logits and a softmax in fp64."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

from pal_ds.backbones import language
from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.language import LanguageHead, logit_scale, with_language_head
from pal_ds.backbones.packed import DECODERS, NAME
from pal_ds.backbones.transformer import TransformerBackbone, architecture_config
from pal_ds.data.batch import Batch
from pal_ds.data.collator import Collator
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tables import PreparedData
from pal_ds.errors import UserError
from tests.backbones.test_packed import GROUPED, OTHER_SIZES, SIZES
from tests.tiny import LLAMA, write_pairs

ROWS = np.array([3, 4, 3, 10, 11, 12, 13])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder: Path = tmp_path_factory.mktemp("language")
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 60)))
    settings = {"max_length": 80, "vocab_size": 300, "dev_fraction": 0, "test_fraction": 0}
    return prepare(DataConfig(path=str(folder / "data"), source=source, **settings), quiet=True)


def backbone_of(family: str, data: PreparedData, **options: Any) -> tuple[TransformerBackbone, Any]:
    """A backbone with the output layer of a random model, and that whole model."""
    sizes = {**OTHER_SIZES.get(family, {**SIZES, **GROUPED}), **options}
    config = BackboneConfig(architecture={"model_type": family, **sizes})
    torch.manual_seed(0)
    model_config = architecture_config(config, data.info["tokens"]["vocab_size"])
    whole = AutoModelForCausalLM.from_config(model_config, attn_implementation=NAME)
    layer = whole.get_output_embeddings()
    if layer.bias is not None:
        torch.nn.init.normal_(layer.bias)
    output = LanguageHead(layer.weight, layer.bias, logit_scale(model_config))
    backbone = TransformerBackbone(whole.base_model, prompt_tokens=False, language=output)
    return backbone.train(), whole


def reference(whole: Any, data: PreparedData, rows: np.ndarray) -> Tensor:
    """Mean over the tokens of each preferred response of -log softmax in fp64, one text at a time."""
    collator, losses = Collator(data), []
    for row in data.comparisons[rows]:
        head, tail = collator.sequence(int(row["a" if row["label"] < 0 else "b"]))
        ids = torch.from_numpy(np.concatenate([head, tail]).astype(np.int64))[None]
        logits = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
        shares = logits.log_softmax(-1)
        places = [place for place in range(len(head), ids.shape[1]) if place > 0]
        losses.append(-torch.stack([shares[p - 1, ids[0, p]] for p in places]).mean())
    return torch.stack(losses)


def gradients(module: torch.nn.Module, total: Tensor) -> Tensor:
    module.zero_grad()
    total.backward()
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def batch_of(data: PreparedData, rows: np.ndarray = ROWS, **options: Any) -> Batch:
    collator = Collator(data, with_answers=True, with_prompt=True, **options)
    return collator(rows, np.arange(len(rows)))


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_every_family_in_both_layouts(family: str, data: PreparedData) -> None:
    backbone, whole = backbone_of(family, data)
    wanted = reference(whole, data, ROWS)
    weight = torch.arange(1.0, len(ROWS) + 1)
    theirs = gradients(backbone, (wanted.float() * weight).sum())
    for packed in (False, True):
        _, losses = backbone.with_token_losses(batch_of(data, packed=packed))
        assert (losses - wanted).abs().max() <= 1e-5 * wanted.max()
        ours = gradients(backbone, (losses * weight).sum())
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("scored", ["last", "all"])
@pytest.mark.parametrize("max_length", [60, 44])
def test_truncated_prompts(data: PreparedData, max_length: int, scored: Any) -> None:
    tokens = {**data.info["tokens"], "max_length": max_length}
    cut = dataclasses.replace(data, info={**data.info, "tokens": tokens})
    fits = [cut.responses.lengths_of(cut.comparisons[side]) <= max_length for side in ("a", "b")]
    rows = np.flatnonzero(fits[0] & fits[1])[:12]
    assert len(rows) == 12
    backbone, whole = backbone_of("llama", data)
    wanted = reference(whole, cut, rows)
    for packed in (False, True):
        batch = batch_of(cut, rows, packed=packed, scored_positions=scored)
        found = backbone.with_token_losses(batch)[1]
        assert (found - wanted).abs().max() <= 1e-5 * wanted.max()


def test_a_response_without_room_for_a_prompt(data: PreparedData) -> None:
    """Nothing predicts its first token: that one is left out, in both layouts."""
    longest = int(data.responses.lengths.max())
    tokens = {**data.info["tokens"], "max_length": longest, "prefix_ids": []}
    cut = dataclasses.replace(data, info={**data.info, "tokens": tokens})
    response = int(np.argmax(data.responses.lengths))
    table = cut.comparisons
    rows = np.flatnonzero((table["a"] == response) | (table["b"] == response))
    backbone, whole = backbone_of("gpt2", data)
    wanted = reference(whole, cut, rows)
    for packed in (False, True):
        found = backbone.with_token_losses(batch_of(cut, rows, packed=packed))[1]
        assert (found - wanted).abs().max() <= 1e-5 * wanted.max()


def test_the_prompt_and_the_rejected_response_are_not_asked_for(data: PreparedData) -> None:
    """Logits are made for the tokens of preferred responses, each response once, and no others."""
    batch = batch_of(data, packed=True)
    table = data.comparisons[ROWS]
    preferred = np.unique(np.where(table["label"] < 0, table["a"], table["b"]))
    assert len(preferred) < len(ROWS)  # one comparison is there twice
    assert batch.answers is not None
    wanted = np.concatenate([data.responses[int(response)] for response in preferred])
    assert batch.answers.target.tolist() == wanted.tolist()
    assert batch.answers.lengths.tolist() == data.responses.lengths_of(preferred).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_no_more_than_the_last_bits(dtype: torch.dtype, monkeypatch: Any) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(37, 16, dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter(torch.randn(50, 16, dtype=dtype))
    bias = torch.nn.Parameter(torch.randn(50, dtype=dtype))
    target = torch.randint(50, (37,))
    outcomes = []
    for logits_at_a_time in (10**6, 5 * 50, 1):
        monkeypatch.setattr(language, "CHUNK_LOGITS", logits_at_a_time)
        losses = LanguageHead(weight, bias, 0.5)(hidden, target)
        grads = torch.autograd.grad(losses.square().sum(), (hidden, weight, bias))
        outcomes.append((losses, *grads))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    logits = (exact[0] @ exact[1].t() + exact[2]) * 0.5
    losses = -logits.log_softmax(-1)[torch.arange(37), target]
    exact_outcome = (losses, *torch.autograd.grad(losses.square().sum(), exact))
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for outcome in outcomes:
        assert outcome[0].dtype == torch.float32
        for ours, wanted in zip(outcome, exact_outcome, strict=True):
            assert (ours.double() - wanted).norm() <= bound * wanted.norm()


def test_checkpointed_activations_and_adapters(data: PreparedData) -> None:
    from peft import LoraConfig, get_peft_model

    backbone, _ = backbone_of("llama", data)
    batch = batch_of(data, packed=True)
    plain = gradients(backbone, backbone.with_token_losses(batch)[1].sum())
    backbone.model.gradient_checkpointing_enable({"use_reentrant": False})
    again = gradients(backbone, backbone.with_token_losses(batch)[1].sum())
    assert (plain - again).norm() <= 1e-6 * plain.norm()
    options = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    backbone.model = get_peft_model(backbone.model, options)
    assert backbone.language is not None
    backbone.language.requires_grad_(False)
    gradients(backbone, backbone.with_token_losses(batch)[1].sum())
    with_gradient = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert with_gradient and all("lora" in name for name in with_gradient)


@pytest.mark.parametrize("tied", [False, True])
def test_reading_the_output_layer(tmp_path: Path, tied: bool) -> None:
    """As it was saved, tied or apart; a folder without one is refused, unless the embedding is one."""
    config = BackboneConfig(architecture={**LLAMA, "tie_word_embeddings": tied})
    whole = AutoModelForCausalLM.from_config(architecture_config(config, 64))
    whole.save_pretrained(tmp_path / "whole")
    model, output = with_language_head(str(tmp_path / "whole"))
    assert type(model) is type(AutoModel.from_config(whole.config))
    assert torch.equal(output.weight, whole.lm_head.weight)
    assert (output.weight is model.embed_tokens.weight) == tied
    whole.base_model.save_pretrained(tmp_path / "base")
    if tied:
        model, output = with_language_head(str(tmp_path / "base"))
        assert output.weight is model.embed_tokens.weight
        assert torch.equal(output.weight, whole.lm_head.weight)
    else:
        with pytest.raises(UserError, match=r"loss\.lm_weight: .*base holds no lm_head\.weight"):
            with_language_head(str(tmp_path / "base"))
