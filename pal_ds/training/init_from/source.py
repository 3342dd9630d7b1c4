"""The origin of a run: weights, head and users of another run or of an exported folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pal_ds.data.tables import DatasetInfo
from pal_ds.export.weights import Tensors
from pal_ds.heads.base import Head
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.runs.run_dir import OriginSource
from pal_ds.users.ids import UserIds

STOCK_HEAD = "score.weight"
"""Name of a stock class's only tensor beyond the backbone."""


@dataclass(frozen=True)
class Origin:
    """An origin of weights; none of the backbone's is read yet."""

    path: Path
    facts: OriginSource
    """Kind, step and hash, which name the origin for good."""
    info: DatasetInfo
    """`kind`, `tokens` and `vector_size`, as in dataset.json of the data it was trained on."""
    tokenizer: Path
    tokenizer_rewritten: bool
    model_config: Any
    """transformers config of the backbone; None for vectors."""
    frozen_path: str | None
    """Folder or hub id of a backbone that was never trained and lies outside of the run; weights is None then."""
    weights: Callable[[], Tensors] | None
    """Reads the backbone's tensors, by the names of its transformers class."""
    output_layer: Tensors | None
    """Output layer of the language model, by its full names, where one lies beside the weights and is not tied."""
    head: str
    """Class name of the head."""
    head_tensors: dict[str, Tensor]
    users: Callable[[Head], tuple[UserIds, Float[Tensor, "U K"]]]
    """Ids and logits, for a head of this very class and these tensors."""


def logits_of(head: Head, mixtures: Float[Tensor, "U K"]) -> Float[Tensor, "U K"] | None:
    """Return logits that this head turns into these mixtures if s = softmax(w / tau), up to a constant; else None.

    tau is read off what the head makes of the logits (1, 0, .., 0).
    """
    from pal_ds.heads.base import UserState

    head = head.eval()
    probe = torch.zeros(1, mixtures.shape[1])
    probe[0, 0] = 1.0
    with torch.no_grad():
        shares = head.mixture_weights(UserState(probe))[0]
        if mixtures.shape[1] < 2 or not 0 < shares[1] < shares[0]:
            return None
        # Below what a float can tell apart, a share is as good as this one.
        logits = mixtures.double().clamp(min=1e-12).log()
        logits = (logits / (shares[0] / shares[1]).double().log()).float()
        roundtrip = head.mixture_weights(UserState(logits))
    return logits if torch.allclose(roundtrip, mixtures, atol=1e-5) else None
