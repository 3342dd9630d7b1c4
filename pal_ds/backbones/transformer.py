"""A transformers decoder or encoder as a backbone; the only place that imports transformers models.

It knows nothing of heads, users or losses: token ids and positions in, hidden states out.
"""

import difflib
import logging
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoConfig, AutoModel, PreTrainedModel
from transformers.initialization import no_init_weights

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.packed import (
    Layout,
    packed_states,
    pooled_states,
    refuse_without_flash,
)
from pal_ds.backbones.packed_attention import NAME as PACKED
from pal_ds.backbones.packed_blocks import blocks_of
from pal_ds.data.batch import Batch
from pal_ds.errors import UserError
from pal_ds.exported.encoding import drop_unused_modules, encode_tokens, hidden_size_of, is_encoder
from pal_ds.heads.base import Features

logger = logging.getLogger(__name__)

# Our own bars tell of progress; transformers would draw one per rank for every load.
transformers.utils.logging.disable_progress_bar()


class TransformerBackbone(nn.Module):
    """Hidden states [R, T, H] of the scored positions, and of the prompts [P, C, H] where a head reads them."""

    def __init__(
        self,
        model: nn.Module,
        *,
        pool_mean: bool,
        prompt_tokens: bool,
        layout: Layout | None = None,
    ) -> None:
        """`pool_mean`: one mean per row (encoders); `prompt_tokens`: every prompt position, not the last.

        `layout`: how attention sees packed batches; SDPA over blocks where unset.
        """
        super().__init__()
        self.model = model
        self.layout = layout or partial(blocks_of, causal=not pool_mean)
        self.pool_mean, self.prompt_tokens = pool_mean, prompt_tokens

    def forward(self, batch: Batch) -> Features:
        response, prompt, prompt_length = self.states(batch)
        return Features(response, batch.response_index, prompt, batch.prompt_index, prompt_length)

    def states(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(responses [R, T, H], prompts [P, C, H], valid positions of each prompt [P])."""
        if batch.packing is not None:
            if self.pool_mean:
                return pooled_states(self.model, batch, self.layout)
            return packed_states(self.model, batch, self.layout, prompt_tokens=self.prompt_tokens)
        assert batch.input_ids is not None and batch.attention_mask is not None
        assert batch.response_positions is not None, "this batch carries states, not token ids"
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
    if config.path.startswith(("/", ".", "~")) and not Path(config.path).is_dir():
        raise UserError(f"backbone.path: no folder {config.path} (looked from {Path.cwd()}).")
    try:
        return AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"backbone.path: transformers cannot open {config.path!r} ({str(error).splitlines()[0]}). "
            "Give a folder with config.json and weights, or a hub id that this machine can reach."
        ) from None


def architecture_config(config: BackboneConfig, vocab_size: int) -> Any:
    """The transformers config of `config.architecture`.

    Raises:
        UserError: transformers knows no such model, or refuses one of its options.
    """
    options = dict(config.architecture or {})
    model_type = str(options.pop("model_type", None))
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=3)
        raise UserError(
            f"backbone.architecture: model_type is {model_type}, which transformers does not know. "
            f"Give one that it does, such as {', '.join(near or ('llama', 'qwen3', 'bert'))}."
        )
    # transformers takes any name and forgets it: a misspelt size would be the default one.
    known = AutoConfig.for_model(model_type)
    for key in options:
        if not hasattr(known, key):
            near = difflib.get_close_matches(key, list(vars(known)), n=1)
            raise UserError(
                f"backbone.architecture: {model_type} has no option {key}."
                + (f" Did you mean {near[0]}?" if near else "")
            )
    try:
        return AutoConfig.for_model(model_type, **options, vocab_size=vocab_size)
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"backbone.architecture: transformers refuses {options} for {model_type} ({reason})."
        ) from None


def materialise_architecture(
    config: BackboneConfig, vocab_size: int, seed: int, folder: Path
) -> None:
    """Builds `config.architecture` with random weights from `seed` and saves it (fp32 safetensors) to `folder`.

    Random weights are written once and then loaded like any other, so that they are the same on every world size
    and ZeRO stage, and a run's folder names what it started from.
    """
    model_config = architecture_config(config, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(model_config, dtype=torch.float32)
    model.save_pretrained(folder)


def load_transformer(
    config: BackboneConfig, *, precision: str, seed: int, gpu: bool, packed: bool = False
) -> PreTrainedModel | Any:
    """Loads `config.path` for its tuning: trainable, with adapters, or frozen.

    `packed`: with the attention that packed batches need; padded ones it leaves to SDPA.
    Call it inside the engine's loading context: under ZeRO-3 the weights are then partitioned as they are read.
    """
    assert config.path is not None, "materialise `backbone.architecture` first"
    attention = PACKED
    if not packed:
        choice = choose_attention(config.attention, precision, gpu, read_model_config(config))
        attention, reason = choice
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
        with warnings.catch_warnings():
            # The name that newer transformers prefer is missing in the older ones we support.
            warnings.filterwarnings("ignore", category=FutureWarning)
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
    if config.tuning == "lora":
        model = _add_adapters(model, config, seed)
    return model


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


def _add_adapters(model: PreTrainedModel, config: BackboneConfig, seed: int) -> nn.Module:
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


def choose_attention(
    wanted: str, precision: str, gpu: bool, model_config: Any = None
) -> tuple[str, str]:
    """(implementation, reason) for padded rows: flash-attn where it can run, else SDPA, else eager.

    Raises:
        UserError: flash-attn is asked for by name and cannot run.
    """
    if wanted in ("sdpa", "eager"):
        return wanted, "asked for by backbone.attention"
    obstacle = None
    if not gpu:
        obstacle = "no GPU"
    elif precision != "bf16":
        obstacle = f"flash-attn needs half precision, the run is {precision}"
    elif not transformers.utils.is_flash_attn_2_available():
        obstacle = "flash-attn is not installed"
    if obstacle is None:
        return "flash_attention_2", "flash-attn is installed and the run is bf16 on a GPU"
    refuse_without_flash(wanted, obstacle)
    model_class = MODEL_MAPPING.get(type(model_config), None)
    if not getattr(model_class, "_supports_sdpa", True):
        return "eager", f"{obstacle}, and transformers has no SDPA for {model_config.model_type}"
    return "sdpa", obstacle


__all__ = [
    "TransformerBackbone",
    "architecture_config",
    "choose_attention",
    "hidden_size_of",
    "is_encoder",
    "load_transformer",
    "materialise_architecture",
    "read_model_config",
]
