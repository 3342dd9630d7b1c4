"""Packed rows against padded ones: states and gradients of every family, windows, truncation, both kinds of attention.

The padded batch is the plain encoding of each response after its prompt, one row each.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.packed import DECODERS, ENCODERS, NAME, choose_layout, drops_attention
from pal_ds.backbones.packed_blocks import blocks_of
from pal_ds.backbones.packed_spans import Spans, spans_of
from pal_ds.backbones.transformer import (
    TransformerBackbone,
    architecture_config,
    choose_attention,
)
from pal_ds.data.batch import Batch
from pal_ds.data.collator import Collator
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tables import PreparedData
from pal_ds.errors import UserError
from tests.tiny import write_pairs

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GROUPED = {"num_key_value_heads": 2}
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 128,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "gpt_neox": {**SIZES, "hidden_dropout": 0.0},
    "opt": {
        **{name: SIZES[name] for name in SIZES if name != "intermediate_size"},
        "ffn_dim": 48,
        "word_embed_proj_dim": 16,
        "do_layer_norm_before": False,
        "dropout": 0,
    },
    "starcoder2": {
        **SIZES,
        **GROUPED,
        **dict.fromkeys(("residual_dropout", "embedding_dropout", "attention_dropout"), 0.0),
    },
    "distilbert": {
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 2,
        "n_heads": 2,
        "max_position_embeddings": 128,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    },
    **{
        name: {
            **SIZES,
            **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
        }
        for name in ("bert", "roberta", "xlm-roberta")
    },
    **{name: {**SIZES, **GROUPED, "head_dim": 8} for name in ("gemma", "glm", "mistral", "qwen3")},
}
WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8},
    # Only some layers have the window.
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 8},
    "exaone4": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {"sliding_window": 8},
}
ROWS = np.array([3, 4, 3, 10, 11, 12, 13])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    folder: Path = tmp_path_factory.mktemp("packed")
    source = Jsonl(str(write_pairs(folder / "pairs.jsonl", 60)))
    settings = {"max_length": 80, "vocab_size": 300, "dev_fraction": 0, "test_fraction": 0}
    return prepare(DataConfig(path=str(folder / "data"), source=source, **settings), quiet=True)


def backbone_of(
    family: str, data: PreparedData, options: dict[str, Any] | None = None, **arguments: Any
) -> TransformerBackbone:
    sizes = {**OTHER_SIZES.get(family, {**SIZES, **GROUPED}), **(options or {})}
    config = BackboneConfig(architecture={"model_type": family, **sizes})
    torch.manual_seed(0)
    model = AutoModel.from_config(
        architecture_config(config, data.info["tokens"]["vocab_size"]), attn_implementation=NAME
    )
    defaults: dict[str, Any] = {"prompt_tokens": False}
    return TransformerBackbone(model, **{**defaults, **arguments}).train()


def outcome(backbone: TransformerBackbone, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """States of each comparison's responses and prompts, and all gradients of a fixed random sum of them."""
    features = backbone(batch)
    response = features.response[features.response_index]
    prompt = features.prompt[features.prompt_index]
    generator = torch.Generator().manual_seed(1)
    seen = prompt if prompt.shape[2] == 1 else prompt[:, :, :5]
    parts = (response, seen)
    total = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in parts)
    backbone.zero_grad()
    assert isinstance(total, Tensor)
    total.backward()
    gradients = [p.grad.flatten() for p in backbone.parameters() if p.grad is not None]
    return response.detach(), seen.detach(), torch.cat(gradients)


def assert_same(backbone: TransformerBackbone, collator: Collator, rows: np.ndarray = ROWS) -> None:
    padded, packed = (
        outcome(backbone, dataclasses.replace(collator, packed=packed)(rows, np.arange(len(rows))))
        for packed in (False, True)
    )
    for ours, plain in zip(packed[:2], padded[:2], strict=True):
        assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()
    # Of all gradients together: some are zero in theory (OPT's key bias) and noise in both.
    assert (packed[2] - padded[2]).norm() <= 1e-5 * padded[2].norm()


@pytest.mark.parametrize("family", sorted(DECODERS))
def test_states_and_gradients_of_every_family(family: str, data: PreparedData) -> None:
    collator = Collator(data, scored_positions="all", with_prompt=True)
    assert_same(backbone_of(family, data), collator)


@pytest.mark.parametrize("family", WINDOWS)
def test_windows_narrower_than_a_row(family: str, data: PreparedData) -> None:
    collator = Collator(data, with_prompt=True)
    narrow = backbone_of(family, data, WINDOWS[family])
    assert_same(narrow, collator)
    batch = dataclasses.replace(collator, packed=True)(ROWS, np.arange(len(ROWS)))
    wide = backbone_of(family, data)
    assert not torch.allclose(narrow(batch).response, wide(batch).response, atol=1e-3)


@pytest.mark.parametrize("prompt_tokens", [False, True])
@pytest.mark.parametrize("max_length", [80, 60, 48])
def test_truncated_prompts(data: PreparedData, max_length: int, prompt_tokens: bool) -> None:
    """Truncation depends on the response: one prompt in several versions, none at all where an answer fills the row."""
    tokens = {**data.info["tokens"], "max_length": max_length}
    cut = dataclasses.replace(data, info={**data.info, "tokens": tokens})
    fits = cut.responses.lengths_of(cut.comparisons["b"]) <= max_length
    fits &= cut.responses.lengths_of(cut.comparisons["a"]) <= max_length
    rows = np.flatnonzero(fits)[:12]
    assert len(rows) == 12
    collator = Collator(cut, scored_positions="all", with_prompt=True)
    backbone = backbone_of("llama", data, prompt_tokens=prompt_tokens)
    assert_same(backbone, collator, rows)


def test_a_response_without_room_for_a_prompt(data: PreparedData) -> None:
    longest = int(data.responses.lengths.max())
    tokens = {**data.info["tokens"], "max_length": longest}
    cut = dataclasses.replace(data, info={**data.info, "tokens": tokens})
    response = int(np.argmax(data.responses.lengths))
    table = cut.comparisons
    rows = np.flatnonzero((table["a"] == response) | (table["b"] == response))
    collator = Collator(cut, with_prompt=True)
    packed = dataclasses.replace(collator, packed=True)(rows, np.arange(len(rows)))
    assert packed.packing is not None and 0 in packed.packing.sequence_start.diff().tolist()
    assert_same(backbone_of("gpt2", data), collator, rows)


def by_loops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Spans,
    dropout: float,
    scaling: float | None,
    window: int | None,
) -> Tensor:
    """What the kernels promise, sequence by sequence: the last query of each stands at its last key."""
    assert dropout == 0
    starts = spans.query_start.tolist(), spans.key_start.tolist()
    parts = []
    for index in range(len(starts[0]) - 1):
        q, k, v = (
            part[start[index] : start[index + 1]].transpose(0, 1)
            for part, start in ((query, starts[0]), (key, starts[1]), (value, starts[1]))
        )
        behind = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
        behind = behind - torch.arange(k.shape[1])
        mask = ((behind >= 0) & (behind < (window or k.shape[1]))) | (not spans.causal)
        output = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        assert q.shape[1] <= spans.longest_query and k.shape[1] <= spans.longest_key
        parts.append(output.transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_sequences_for_variable_length_kernels(family: str, data: PreparedData) -> None:
    collator = Collator(data, scored_positions="all", with_prompt=True)
    layout = lambda packing: spans_of(packing, by_loops)  # noqa: E731
    backbone = backbone_of(family, data, WINDOWS.get(family), layout=layout)
    assert_same(backbone, collator)


def test_no_token_is_padding_and_prompts_come_once(data: PreparedData) -> None:
    batch = Collator(data, packed=True)(ROWS, np.arange(len(ROWS)))
    table = data.comparisons[ROWS]
    responses = np.unique(np.concatenate([table["a"], table["b"]]))
    prompts = np.unique(data.response_prompt[responses])
    assert len(prompts) < len(ROWS) < len(responses)
    num_tokens = data.responses.lengths_of(responses).sum() + data.prompts.lengths_of(prompts).sum()
    assert batch.input_ids is not None and batch.input_ids.shape == (1, num_tokens)


@pytest.mark.parametrize("prompt_tokens", [False, True])
@pytest.mark.parametrize("layout", ["blocks", "spans"])
def test_texts_that_do_not_see_each_other(
    data: PreparedData, layout: str, prompt_tokens: bool
) -> None:
    """Separate encoding: the same states as joint ones nowhere, those of each text alone everywhere."""
    options: dict[str, Any] = {"prompt_tokens": prompt_tokens}
    if layout == "spans":
        options["layout"] = lambda packing: spans_of(packing, by_loops)
    backbone = backbone_of("opt", data, **options)
    collator = Collator(data, scored_positions="all", with_prompt=True, encoding="separate")
    assert_same(backbone, collator)
    rows = (ROWS, np.arange(len(ROWS)))
    alone = dataclasses.replace(collator, packed=True)(*rows)
    joint = dataclasses.replace(collator, packed=True, encoding="joint")(*rows)
    assert alone.input_ids is not None and joint.input_ids is not None
    assert not torch.allclose(backbone(alone).response, backbone(joint).response, atol=1e-3)


@pytest.mark.parametrize("layout", ["default", "spans"])
@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_encoders(data: PreparedData, family: str, layout: str) -> None:
    """Every text sees all of itself and nothing else; its mean is the state."""
    spans = partial(spans_of, kernel=by_loops, causal=False)
    chosen = spans if layout == "spans" else None
    # XLM-R's positions begin behind its pad id.
    pad = {"pad_token_id": 3} if family == "xlm-roberta" else {}
    backbone = backbone_of(family, data, pad, pooling="mean", layout=chosen)
    options = {"pooled": True, "pad_token_id": backbone.model.config.pad_token_id}
    assert_same(backbone, Collator(data, with_prompt=True, encoding="separate", **options))
    joint = Collator(data, **options)
    batches = [dataclasses.replace(joint, packed=packed)(ROWS, ROWS) for packed in (False, True)]
    padded, packed = (backbone(batch).response for batch in batches)
    assert torch.allclose(padded, packed, atol=1e-5)
    assert batches[1].input_ids is not None and batches[0].attention_mask is not None
    assert batches[1].input_ids.numel() == int(batches[0].attention_mask.sum())


def one_by_one(backbone: TransformerBackbone, collator: Collator, pooling: str) -> Tensor:
    """States of the responses of ROWS and then of their prompts, each text encoded and pooled by itself."""
    states: list[Tensor] = []
    table = collator.data.comparisons[ROWS]
    responses = np.unique(np.concatenate([table["a"], table["b"]])).tolist()
    for part in (slice(None), 0):
        for response in responses:
            head, tail = collator.sequence(response)
            ids = np.concatenate([head, tail]) if part != 0 else head
            if part == 0 and collator.encoding == "separate":
                ids = collator.prompt_sequence(int(collator.data.response_prompt[response]))
            ids = torch.from_numpy(ids.astype(np.int64))[None]
            hidden = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids))
            hidden = hidden.last_hidden_state[0].double()
            kinds = {"mean": hidden.mean(0), "max": hidden.amax(0)}
            states.append(torch.cat([kinds[kind] for kind in pooling.split("_")]))
    return torch.stack(states)


@pytest.mark.parametrize("encoding", ["joint", "separate"])
@pytest.mark.parametrize("pooling", ["mean", "max", "mean_max"])
@pytest.mark.parametrize("max_length", [80, 60])
def test_pooled_decoders(data: PreparedData, pooling: Any, encoding: Any, max_length: int) -> None:
    """Over prompt and response, and a prompt over its own, whatever the layout and however much was cut."""
    tokens = {**data.info["tokens"], "max_length": max_length}
    cut = dataclasses.replace(data, info={**data.info, "tokens": tokens})
    backbone = backbone_of("llama", data, pooling=pooling)
    collator = Collator(cut, with_prompt=True, encoding=encoding)
    assert_same(backbone, collator)
    batch = collator(ROWS, np.arange(len(ROWS)))
    features = backbone(batch)
    slots = torch.zeros(len(features.response), dtype=torch.int64)
    assert features.prompt is not None and features.prompt_index is not None
    slots[features.response_index.flatten()] = features.prompt_index.flatten()
    found = torch.cat([features.response[:, 0], features.prompt[slots][:, 0]])
    wanted = one_by_one(backbone, collator, pooling)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("pooling", ["mean", "max", "mean_max"])
def test_pooled_without_room_for_a_prompt(data: PreparedData, pooling: Any) -> None:
    longest = int(data.responses.lengths.max())
    tokens = {**data.info["tokens"], "max_length": longest}
    cut = dataclasses.replace(data, info={**data.info, "tokens": tokens})
    response = int(np.argmax(data.responses.lengths))
    table = cut.comparisons
    rows = np.flatnonzero((table["a"] == response) | (table["b"] == response))
    assert_same(backbone_of("gpt2", data, pooling=pooling), Collator(cut, with_prompt=True), rows)


@pytest.mark.parametrize("family", sorted(ENCODERS))
def test_largest_entries_of_encoders(data: PreparedData, family: str) -> None:
    pad = {"pad_token_id": 3} if family == "xlm-roberta" else {}
    backbone = backbone_of(family, data, pad, pooling="max")
    options = {"pooled": True, "pad_token_id": backbone.model.config.pad_token_id}
    assert_same(backbone, Collator(data, with_prompt=True, encoding="separate", **options))


def test_responses_alone(data: PreparedData) -> None:
    """Without a reader of prompts there are none in the row."""
    collator = Collator(data, packed=True, encoding="separate")
    batch = collator(ROWS, np.arange(len(ROWS)))
    assert batch.packing is not None and batch.packing.num_prompts == 0
    padded = dataclasses.replace(collator, packed=False)(ROWS, np.arange(len(ROWS)))
    for layout in (blocks_of, lambda packing: spans_of(packing, by_loops)):
        backbone = backbone_of("llama", data, layout=layout)
        states = [backbone(part).response for part in (batch, padded)]
        assert torch.allclose(*states, atol=1e-5)


def test_gradients_are_the_same_bits_again(data: PreparedData) -> None:
    collator = Collator(data, packed=True, scored_positions="all", with_prompt=True)
    backbone = backbone_of("qwen3", data)
    batch = collator(ROWS, np.arange(len(ROWS)))
    first, second = (outcome(backbone, batch) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(data: PreparedData, reentrant: bool) -> None:
    backbone = backbone_of("llama", data)
    backbone.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        backbone.model.enable_input_require_grads()
    assert_same(backbone, Collator(data, with_prompt=True))


def test_adapters(data: PreparedData) -> None:
    from peft import LoraConfig, get_peft_model

    backbone = backbone_of("qwen2", data)
    options = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    backbone.model = get_peft_model(backbone.model, options)
    assert_same(backbone, Collator(data, with_prompt=True))


def test_layouts_are_chosen_by_hardware_and_precision() -> None:
    def name(*arguments: str, gpu: bool, dropout: bool = False) -> str:
        return choose_layout(*arguments, gpu=gpu, dropout=dropout)[0].func.__name__  # pyright: ignore

    assert name("auto", "fp32", gpu=True) == "blocks_of"
    assert name("auto", "bf16", gpu=False) == "blocks_of"
    assert name("sdpa", "bf16", gpu=True) == "blocks_of"
    assert name("auto", "bf16", gpu=True) == "spans_of"
    # Torch's kernel, the one there is without flash-attn, has no dropout.
    assert name("auto", "bf16", gpu=True, dropout=True) == "blocks_of"
    assert drops_attention(CONFIG_MAPPING["bert"]()) and not drops_attention(
        CONFIG_MAPPING["llama"]()
    )
    for choose in (choose_layout, choose_attention):
        with pytest.raises(UserError, match="flash_attention_2 cannot run here"):
            choose("flash_attention_2", "fp32", gpu=False)


def test_a_model_without_sdpa_is_eager() -> None:
    config = CONFIG_MAPPING["bloom"]()
    assert choose_attention("auto", "fp32", gpu=False, model_config=config)[0] == "eager"


def test_a_layer_compiles_as_one_graph(data: PreparedData) -> None:
    """Forward and backward, for batches of different shapes; `fullgraph` raises at a graph break."""
    backbone = backbone_of("llama", data)
    collator = Collator(data, packed=True, with_prompt=True)
    batches = [collator(rows, np.arange(len(rows))) for rows in (ROWS, np.arange(20, 25))]
    plain = [outcome(backbone, batch) for batch in batches]
    backbone.model.layers[0].compile(fullgraph=True, dynamic=True, backend="aot_eager")  # pyright: ignore
    for batch, wanted in zip(batches, plain, strict=True):
        for ours, eager in zip(outcome(backbone, batch), wanted, strict=True):
            assert (ours - eager).norm() <= 1e-5 * eager.norm()
