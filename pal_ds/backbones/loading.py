"""Reads a transformers model for its tuning, with the attention that padded or packed batches need."""

import logging
import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.initialization import no_init_weights

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.language import LanguageHead, with_language_head
from pal_ds.backbones.packed_attention import NAME as PACKED
from pal_ds.backbones.transformer import choose_attention, read_model_config
from pal_ds.errors import UserError
from pal_ds.remote_code.encoding import drop_unused_modules

logger = logging.getLogger(__name__)


def load_transformer(
    config: BackboneConfig,
    *,
    precision: str,
    seed: int,
    gpu: bool,
    packed: bool = False,
    language: bool = False,
) -> tuple[PreTrainedModel | Any, LanguageHead | None]:
    """`config.path` for its tuning: trainable, with adapters, or frozen; and its output layer, where `language` asks.

    `packed`: with the attention that packed batches need; padded ones it leaves to SDPA.
    Call it inside the engine's loading context: under ZeRO-3 the weights are then partitioned as they are read.
    """
    assert config.path is not None, "materialise `backbone.architecture` first"
    attention = PACKED
    if not packed:
        choice = choose_attention(config.attention, precision, gpu, read_model_config(config))
        attention, reason = choice
        logger.info("attention: %s (%s)", attention, reason)
    options = {
        "dtype": torch.bfloat16 if precision == "bf16" else torch.float32,
        "attn_implementation": attention,
        "trust_remote_code": config.trust_remote_code,
    }
    output = None
    if language:
        model, output = with_language_head(config.path, **options)
    else:
        model = AutoModel.from_pretrained(config.path, **options)
    drop_unused_modules(model)
    if config.tuning == "frozen":
        return model.requires_grad_(False).eval(), None
    if config.gradient_checkpointing:
        with warnings.catch_warnings():
            # The name that newer transformers prefer is missing in the older ones we support.
            warnings.filterwarnings("ignore", category=FutureWarning)
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
    if config.tuning == "lora":
        model = add_adapters(model, config, seed)
        output = None if output is None else output.requires_grad_(False)
    return model, output


def empty_transformer(
    config: BackboneConfig, precision: str, *, packed: bool
) -> PreTrainedModel | Any:
    """The model of `config.path` without its weights, which the caller fills in; for the CPU."""
    model_config = read_model_config(config)
    choice = choose_attention(config.attention, precision, gpu=False, model_config=model_config)
    attention = PACKED if packed else choice[0]
    with no_init_weights():
        model = AutoModel.from_config(
            model_config,
            dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
        )
    drop_unused_modules(model)
    return model


def add_adapters(model: PreTrainedModel, config: BackboneConfig, seed: int) -> nn.Module:
    """Fresh low-rank adapters around a model. Raises UserError where none of its modules has the names given."""
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # pyright: ignore[reportArgumentType]  peft takes any number
        lora_dropout=config.lora.dropout,
        target_modules=config.lora.target_modules or "all-linear",
    )
    if config.gradient_checkpointing:
        model.enable_input_require_grads()
    torch.manual_seed(seed)
    # One dtype per engine: fp32 adapters beside a bf16 base break ZeRO-3's coalesced gathers.
    try:
        with warnings.catch_warnings():
            # About GPT-2's transposed weights, which peft handles, and between peft and transformers.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            return get_peft_model(model, options, autocast_adapter_dtype=False)
    except ValueError as error:
        raise UserError(
            f"backbone.lora: {error} Name modules of {config.path}, or null for all linear layers."
        ) from None
