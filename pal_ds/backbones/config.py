"""Configuration of the backbone of a run, and of which of its weights move."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pal_ds.errors import UserError
from pal_ds.io.files import expand_home

Pooling = Literal["last", "mean", "max", "mean_max"]
"""Pooling to one state for a text: that of its last token, the mean or largest entry over all, or both of these."""


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters (peft); read with `tuning: lora` only."""

    rank: int = 16
    """Rank of the two factors that are added to a weight."""
    alpha: float = 32.0
    """The product of the factors is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Probability with which an input of an adapter is zeroed in training."""
    target_modules: list[str] | None = None
    """Module names to adapt; null adapts every linear layer."""


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """A transformers decoder or encoder; vector data ignores it."""

    path: str | None = None
    """Local folder or hub id."""
    architecture: dict[str, Any] | None = None
    """In place of `path`: a transformers config with its model_type, built with random weights and the data's
    vocabulary, e.g. {model_type: llama, hidden_size: 64, num_hidden_layers: 2, ...}."""
    num_layers: int | None = None
    """Layers (blocks) to keep, from the first; null: all. A score reads the states behind the last one kept, and time,
    memory and the export shrink with it. The middle of a frozen model often says more of how a text is written than its
    end (on UKP the third of MiniLM's six gives 5 points more than the last)."""
    tuning: Literal["full", "lora", "frozen"] = "full"
    """full: train every weight; lora: low-rank adapters alone; frozen: none, each text is encoded once."""
    lora: LoraOptions = field(default_factory=LoraOptions)
    attention: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    """auto: flash attention where the run is bf16 on a GPU and flash-attn (for packed rows, torch's own too) is
    installed, else torch's SDPA."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """packed: the distinct texts of a micro-batch in one row without padding, each prompt computed once for all its
    responses; padded: every text a row. auto: packed where the backbone is trained and its family is known to give
    the same states (see `backbones/packed.py`)."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them: less memory, a third more time."""
    encoding: Literal["auto", "joint", "separate"] = "auto"
    """joint: the response after its prompt in one pass; separate: each alone. auto: joint, except where an encoder
    meets a head that reads the prompt."""
    pooling: Literal["auto", "last", "eos", "mean", "max", "mean_max"] = "auto"
    """The one state that stands for a text. last: that of its last token, the end token that `prepare` appends (with
    data.special_tokens: false the response's own last token). eos: the same, and refused where no end token is
    appended. mean, max: over all tokens of prompt and response, and for the prompt over its own. mean_max: both, side
    by side, so the head reads twice the width. auto: last for decoders, mean for encoders, which know no last."""
    trust_remote_code: bool = False
    """Allow code from the model's folder or hub page to run."""
    encode_batch_texts: int = 32
    """Texts per forward when a frozen backbone encodes each distinct text once."""
    cache: str | None = None
    """Folder where a frozen backbone's states outlive the run (`pal-ds embed` fills it); null keeps them in memory."""

    def __post_init__(self) -> None:
        """Take `~` for the home folder. Raises UserError for fewer than one layer."""
        expand_home(self, "path", "cache")
        if self.num_layers is not None and self.num_layers < 1:
            raise UserError(
                f"backbone.num_layers is {self.num_layers}; it must be at least 1, or null for all."
            )
