"""Reads a transformers model for its tuning, with the attention that its batches need; fingerprints frozen weights."""

import contextlib
import logging
import pickle
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.initialization import no_init_weights

from pal_ds.backbones.config import BackboneConfig
from pal_ds.backbones.language import LanguageHead, text_part, with_language_head
from pal_ds.backbones.packed import NAME as PACKED
from pal_ds.backbones.transformer import choose_attention, read_model_config
from pal_ds.distributed import phase
from pal_ds.errors import UserError
from pal_ds.io.files import feed
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
    options, reason = _options(config, precision, gpu=gpu, packed=packed)
    if not packed:
        logger.info("attention: %s (%s)", options["attn_implementation"], reason)
    if config.num_layers is not None:
        options["config"] = read_model_config(config)
        logger.info(
            "backbone.num_layers: the first %d layers are kept, and weights of the others are not read",
            config.num_layers,
        )
    output = None
    expected = contextlib.nullcontext() if config.num_layers is None else _hiding_unread_weights()
    with refusing_pickles(config.path), expected:
        if language:
            model, output = with_language_head(config.path, **options)
        else:
            model = text_part(AutoModel.from_pretrained(config.path, **options))
    if config.num_layers is not None and config.trust_remote_code:
        _refuse_other_depth(model, config)
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


def _refuse_other_depth(model: nn.Module, config: BackboneConfig) -> None:
    """Raise UserError where modelling code of the model's own paid no heed to the number of layers."""
    lists = (part for part in model.modules() if isinstance(part, nn.ModuleList))
    if not any(len(part) == config.num_layers for part in lists):
        raise UserError(
            f"backbone.num_layers: the modelling code of {config.path} built no list of {config.num_layers} layers, so "
            "it may have kept all. Leave the key out, or cut the model yourself."
        )


_REPORTERS = ("transformers.modeling_utils", "transformers.utils.loading_report")
"""Loggers that list the weights of a file for which a model has no place; which of them, its version decides."""
_MATTERS = ("MISSING", "MISMATCH", "CONVERSION")


def _is_worth_telling(record: logging.LogRecord) -> bool:
    """Return False for a message that lists weights of a file which the model has no place for, and nothing else."""
    text = record.getMessage()
    if "LOAD REPORT" in text:
        return any(word in text for word in _MATTERS)
    # The form of transformers 4.
    return "were not used when initializing" not in text


@contextlib.contextmanager
def _hiding_unread_weights() -> Iterator[None]:
    """Keep transformers from listing weights that the model has no place for; what it misses is still told."""
    loggers = [logging.getLogger(name) for name in _REPORTERS]
    for reporter in loggers:
        reporter.addFilter(_is_worth_telling)
    try:
        yield
    finally:
        for reporter in loggers:
            reporter.removeFilter(_is_worth_telling)


@contextlib.contextmanager
def refusing_pickles(path: str | Path) -> Iterator[None]:
    """Raise UserError where weights read inside the block are a pickle that holds more than tensors."""
    try:
        yield
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path}: its weights hold {named[1] if named else 'objects'} beside tensors, and to load objects is to "
            "run code. Save them as safetensors where you trust them, or take another model."
        ) from None


def empty_transformer(
    config: BackboneConfig, precision: str, *, packed: bool
) -> PreTrainedModel | Any:
    """The model of `config.path` without its weights, which the caller fills in; for the CPU."""
    options, _ = _options(config, precision, gpu=False, packed=packed)
    with no_init_weights():
        model = AutoModel.from_config(read_model_config(config), **options)
    drop_unused_modules(model)
    return model


def _options(
    config: BackboneConfig, precision: str, *, gpu: bool, packed: bool
) -> tuple[dict[str, Any], str]:
    """Return transformers' options of a model that is read or built, and why its attention is what it is."""
    attention, reason = PACKED, "rows are packed"
    if not packed:
        model_config = read_model_config(config)
        attention, reason = choose_attention(config.attention, precision, gpu, model_config)
    options = {
        "dtype": torch.bfloat16 if precision == "bf16" else torch.float32,
        "attn_implementation": attention,
        "trust_remote_code": config.trust_remote_code,
    }
    return options, reason


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


def weights_fingerprint(path: str, revision: str | None) -> str:
    """xxh3_128 over the weight files of a local folder; the commit for a hub id, or the id where none is known.

    Raises:
        UserError: the folder holds an adapter, whose base and settings lie outside these files.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"backbone.path: {folder} holds a PEFT adapter (adapter_config.json), which transformers would apply to "
            "weights that no hash here covers. Merge it into its base first (merge_and_unload, then save_pretrained)."
        )
    if not folder.is_dir():
        return f"hub:{path}@{revision or 'unknown'}"
    digest = xxhash.xxh3_128()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        digest.update(file.name.encode())
        feed(digest, file, phase.progress)
    return f"xxh3_128:{digest.hexdigest()}"
