"""A transformers decoder or encoder as a backbone; this folder is the only place that imports transformers models.

It knows nothing of heads, users or losses: token ids and positions in, hidden states out.
"""

import difflib
import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from pal_ds.backbones.config import BackboneConfig, Pooling
from pal_ds.backbones.fitness import refuse_type, refuse_unfit, refuse_unknown_type
from pal_ds.backbones.language import LanguageHead
from pal_ds.backbones.packed import (
    Layout,
    packed_hidden,
    packed_states,
    pooled_pairs,
    pooled_states,
    refuse_without_flash,
)
from pal_ds.backbones.packed_blocks import blocks_of
from pal_ds.data.batch import Batch
from pal_ds.errors import UserError
from pal_ds.heads.base import Features
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.remote_code.encoding import hidden_states, is_encoder, read_states

logger = logging.getLogger(__name__)

# Our own bars tell of progress; transformers would draw one per rank for every load.
transformers.utils.logging.disable_progress_bar()


class TransformerBackbone(nn.Module):
    """Hidden states [R, T, H] of the scored positions, and of the prompts [P, C, H] where a head reads them."""

    def __init__(
        self,
        model: nn.Module,
        *,
        pooling: Pooling = "last",
        prompt_tokens: bool,
        layout: Layout | None = None,
        language: LanguageHead | None = None,
    ) -> None:
        """`prompt_tokens`: every prompt position, not the last, where texts are not pooled.

        `layout`: how attention sees packed batches; SDPA over blocks where unset. `language`: the model's output
        layer, where the loss asks how likely preferred answers are.
        """
        super().__init__()
        self.model = model
        self.encoder = is_encoder(model.config)
        self.layout = layout or partial(blocks_of, causal=not self.encoder)
        self.pooling: Pooling = pooling
        self.prompt_tokens = prompt_tokens
        # Behind the model, so that an embedding they share goes by the model's name for it.
        self.language = language

    def forward(self, batch: Batch) -> Features:
        return self._features(batch, self._hidden(batch))

    def with_token_losses(self, batch: Batch) -> tuple[Features, Float[Tensor, "B"]]:
        """Also the mean cross-entropy over the tokens of each comparison's preferred response, fp32."""
        assert self.language is not None and batch.answers is not None
        hidden = self._hidden(batch)
        return self._features(batch, hidden), self.language.mean_losses(hidden, batch.answers)

    def _hidden(self, batch: Batch) -> Float[Tensor, "N S H"]:
        """Compute the states of every token of the batch."""
        if batch.packing is not None:
            return packed_hidden(self.model, batch, batch.packing, self.layout)
        assert batch.input_ids is not None and batch.attention_mask is not None
        return hidden_states(self.model, batch.input_ids, batch.attention_mask)

    def _features(self, batch: Batch, hidden: Float[Tensor, "N S H"]) -> Features:
        if batch.packing is None:
            assert batch.attention_mask is not None
            assert batch.response_positions is not None, "this batch carries states, not token ids"
            states = read_states(
                hidden,
                batch.attention_mask,
                batch.response_positions,
                batch.prompt_rows,
                batch.prompt_length,
                pooling=self.pooling,
                prompt_tokens=self.prompt_tokens,
            )
        elif self.encoder:
            states = pooled_states(hidden[0], batch, self.pooling)
        elif self.pooling != "last":
            states = pooled_pairs(hidden[0], batch, self.pooling)
        else:
            states = packed_states(hidden[0], batch, prompt_tokens=self.prompt_tokens)
        response, prompt, prompt_length = states
        return Features(response, batch.response_index, prompt, batch.prompt_index, prompt_length)


def read_model_config(config: BackboneConfig, *, from_disk_only: bool = False) -> Any:
    """The transformers config of `config.path`, of a model with other parts that of its text part; `num_layers` in it.

    With `from_disk_only` the hub is not asked.

    Raises:
        UserError: no path is given, nothing that transformers can open lies there, or it has fewer layers than asked.
    """
    if config.path is None:
        raise UserError("backbone: neither path nor architecture is given. Give one of them.")
    if config.path.startswith(("/", ".", "~")) and not Path(config.path).is_dir():
        raise UserError(f"backbone.path: no folder {config.path} (looked from {Path.cwd()}).")
    try:
        whole = AutoConfig.from_pretrained(
            config.path,
            trust_remote_code=config.trust_remote_code,
            local_files_only=from_disk_only,
        )
    except (OSError, ValueError) as error:
        refuse_unknown_type(Path(config.path))
        raise UserError(
            f"backbone.path: transformers cannot open {config.path!r} ({str(error).splitlines()[0]}). "
            "Give a folder with config.json and weights, or a hub id that this machine can reach."
        ) from None
    text = whole.get_text_config()
    refuse_unfit("backbone.path", whole, text, own_code=config.trust_remote_code)
    if text is not whole:
        text._commit_hash = getattr(whole, "_commit_hash", None)
    if config.num_layers is not None:
        if text is not whole:
            raise UserError(
                f"backbone.num_layers: {config.path} reads more than text, and is taken whole. Leave the key out."
            )
        _keep_layers(text, config.num_layers)
    return text


def _keep_layers(model_config: Any, num_layers: int) -> None:
    """Cut a transformers config to its first layers. Raises UserError where it has fewer."""
    given = model_config.num_hidden_layers
    if num_layers > given:
        raise UserError(
            f"backbone.num_layers: asks for {num_layers} layers, the model has {given}. Give at most that many."
        )
    for key, value in list(vars(model_config).items()):
        # Lists with an entry per layer, as `layer_types`.
        if isinstance(value, list) and len(value) == given:
            setattr(model_config, key, value[:num_layers])
    model_config.num_hidden_layers = num_layers


def architecture_config(config: BackboneConfig, vocab_size: int) -> Any:
    """The transformers config of `config.architecture`.

    Raises:
        UserError: transformers knows no such model, or refuses one of its options.
    """
    options = dict(config.architecture or {})
    model_type = str(options.pop("model_type", None))
    refuse_type("backbone.architecture", model_type)
    # transformers takes any name and forgets it: a misspelt size would be the default one.
    known = AutoConfig.for_model(model_type)
    for key in options:
        if not hasattr(known, key):
            near = difflib.get_close_matches(key, list(vars(known)), n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(f"backbone.architecture: {model_type} has no option {key}.{hint}")
    if (text := known.get_text_config()) is not known:
        raise UserError(
            f"backbone.architecture: {model_type} reads more than text. Give its text part, {text.model_type}."
        )
    refuse_unfit("backbone.architecture", known, known)
    try:
        return AutoConfig.for_model(model_type, **options, vocab_size=vocab_size)
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(
            f"backbone.architecture: transformers refuses {options} for {model_type} ({reason})."
        ) from None


def materialise_architecture(
    config: BackboneConfig, vocab_size: int, seed: int, folder: Path, *, language: bool = False
) -> None:
    """Builds `config.architecture` with random weights from `seed` and saves it (fp32 safetensors) to `folder`.

    `language`: with the output layer of a language model.
    Random weights are written once and then loaded like any other, so that they are the same on every world size
    and ZeRO stage, and a run's folder names what it started from.
    """
    model_config = architecture_config(config, vocab_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        kind = AutoModelForCausalLM if language else AutoModel
        model = kind.from_config(model_config, dtype=torch.float32)
    model.save_pretrained(folder)


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
