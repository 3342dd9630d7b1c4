"""A transformers decoder or encoder as a backbone; the only place that imports transformers models.

It knows nothing of heads, users or losses: token ids and positions in, hidden states out.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel

from pal_ds.backbones.config import BackboneConfig
from pal_ds.data.batch import Batch
from pal_ds.errors import UserError
from pal_ds.exported.encoding import drop_unused_modules, encode_tokens, hidden_size_of, is_encoder
from pal_ds.heads.base import Features

logger = logging.getLogger(__name__)

# Our own bars tell of progress; transformers would draw one per rank for every load.
transformers.utils.logging.disable_progress_bar()


class TransformerBackbone(nn.Module):
    """Hidden states [R, T, H] of the scored positions, and of the prompts [P, C, H] where a head reads them."""

    def __init__(self, model: nn.Module, *, pool_mean: bool, prompt_tokens: bool) -> None:
        """`pool_mean`: one mean over each row's tokens (encoders); `prompt_tokens`: all prompt positions, not the last."""
        super().__init__()
        self.model = model
        self.pool_mean, self.prompt_tokens = pool_mean, prompt_tokens

    def forward(self, batch: Batch) -> Features:
        response, prompt, prompt_length = self.states(batch)
        return Features(response, batch.response_index, prompt, batch.prompt_index, prompt_length)

    def states(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(responses [R, T, H], prompts [P, C, H], valid positions of each prompt [P])."""
        return encode_tokens(
            self.model,
            batch.input_ids,
            batch.attention_mask,
            batch.response_positions,
            batch.prompt_rows,
            batch.prompt_length,
            pool_mean=self.pool_mean,
            prompt_tokens=self.prompt_tokens,
        )


def read_model_config(config: BackboneConfig) -> Any:
    """The transformers config of `config.path`.

    Raises:
        UserError: nothing that transformers can open lies there.
    """
    assert config.path is not None, "materialise `backbone.architecture` first"
    try:
        return AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"backbone.path: transformers cannot open {config.path!r} ({str(error).splitlines()[0]}). "
            "Give a folder with config.json and weights, or a hub id that this machine can reach."
        ) from None


def materialise_architecture(
    config: BackboneConfig, vocab_size: int, seed: int, folder: Path
) -> None:
    """Builds `config.architecture` with random weights from `seed` and saves it (fp32 safetensors) to `folder`.

    Random weights are written once and then loaded like any other, so that they are the same on every world size
    and ZeRO stage, and a run's folder names what it started from.
    """
    options = dict(config.architecture or {})
    try:
        model_config = AutoConfig.for_model(**options, vocab_size=vocab_size)
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"backbone.architecture: transformers refuses {options} ({error}). "
            "It needs a known model_type and that model's own options."
        ) from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(model_config, dtype=torch.float32)
    model.save_pretrained(folder)


def load_transformer(
    config: BackboneConfig, *, precision: str, seed: int, gpu: bool
) -> PreTrainedModel | Any:
    """Loads `config.path` for its tuning: trainable, with adapters, or frozen.

    Call it inside the engine's loading context: under ZeRO-3 the weights are then partitioned as they are read.
    """
    attention, reason = choose_attention(config.attention, precision, gpu)
    logger.info("attention: %s (%s)", attention, reason)
    model = AutoModel.from_pretrained(
        config.path,
        dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        attn_implementation=attention,
        trust_remote_code=config.trust_remote_code,
    )
    drop_unused_modules(model)
    if config.tuning == "frozen":
        return model.requires_grad_(False).eval()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.tuning == "lora":
        model = _add_adapters(model, config, seed)
    return model


def _add_adapters(model: PreTrainedModel, config: BackboneConfig, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules or "all-linear",
    )
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    torch.manual_seed(seed)
    # One dtype per engine: fp32 adapters beside a bf16 base break ZeRO-3's coalesced gathers.
    return get_peft_model(model, options, autocast_adapter_dtype=False)


def choose_attention(wanted: str, precision: str, gpu: bool) -> tuple[str, str]:
    """(implementation, reason): flash-attn where it can run, else SDPA; an explicit choice is kept."""
    if wanted != "auto":
        return wanted, "asked for by backbone.attention"
    if not gpu:
        return "sdpa", "no GPU"
    if precision != "bf16":
        return "sdpa", f"flash-attn needs half precision, the run is {precision}"
    if not transformers.utils.is_flash_attn_2_available():
        return "sdpa", "flash-attn is not installed"
    return "flash_attention_2", "flash-attn is installed and the run is bf16 on a GPU"


__all__ = [
    "TransformerBackbone",
    "choose_attention",
    "hidden_size_of",
    "is_encoder",
    "load_transformer",
    "materialise_architecture",
    "read_model_config",
]
