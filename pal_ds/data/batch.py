"""A micro-batch: every distinct sequence once, plus index tensors that say which comparison looks at which."""

from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from pal_ds.data.answers import Answers
from pal_ds.data.packing import (
    Packing,
)
from pal_ds.heads.jaxtyping_fallback import Float, Int

PartT = TypeVar("PartT")


class Batch(NamedTuple):
    """A micro-batch. Axes: N sequences, S tokens, R distinct responses, T scored positions, P prompts, B comparisons.

    A named tuple for the reason given in `heads/base.py`. Either token ids or stored states are present.
    """

    input_ids: Int[Tensor, "N S"] | None
    """Right-padded; in joint encoding one row per response, in separate encoding responses then prompts."""
    attention_mask: Int[Tensor, "N S"] | None
    response_positions: Int[Tensor, "R T"] | None
    """Column of each scored position in the response's row; past the end it repeats the last one."""
    prompt_rows: Int[Tensor, "P"] | None
    """Row of input_ids that holds each prompt slot."""
    prompt_length: Int[Tensor, "P"] | None
    response_states: Float[Tensor, "R T H"] | None
    prompt_states: Float[Tensor, "P C H"] | None
    response_index: Int[Tensor, "B r"]
    prompt_index: Int[Tensor, "B r"] | None
    window_start: Int[Tensor, "B"]
    window_end: Int[Tensor, "B"]
    label: Int[Tensor, "B"]
    required_margin: Float[Tensor, "B"]
    weight: Float[Tensor, "B"]
    """1, or 0 for the stand-in of an empty run: it keeps the collectives of all ranks in step and adds nothing."""
    user_row: Int[Tensor, "B"]
    position: Int[Tensor, "B"]
    """Global position in the update; -1 for a stand-in."""
    group: Int[Tensor, "B"]
    """Group of each comparison, as the run's data number them; -1 for none."""
    gumbel: Float[Tensor, "B K"] | None = None
    normal: Float[Tensor, "B K"] | None = None
    context: Int[Tensor, "B N 2"] | None = None
    """Other comparisons of the same user: responses of the batch that were preferred and rejected."""
    context_length: Int[Tensor, "B"] | None = None
    """Number of comparisons in each context."""
    packing: Packing | None = None
    """Given where all texts lie in one row (N = 1): response_positions and prompt_rows are then columns of it, the
    latter of each prompt's first token."""
    answers: Answers | None = None
    """The tokens of preferred responses, where the loss asks how likely they are."""

    def to(self, device: torch.device) -> "Batch":
        return _moved(self, device)


def _moved(part: PartT, device: torch.device) -> PartT:
    """A named tuple with its tensors on `device`."""
    if isinstance(part, Tensor):
        return cast(PartT, part.to(device, non_blocking=True))
    if isinstance(part, tuple):
        inner = [_moved(piece, device) for piece in part]
        moved = type(part)(*inner) if hasattr(part, "_fields") else tuple(inner)
        return cast(PartT, moved)
    return part
