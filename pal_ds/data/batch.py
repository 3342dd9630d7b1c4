"""A micro-batch: every distinct sequence once, plus index tensors that say which comparison looks at which."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.packing import Packing
from pal_ds.data.ragged import Ragged
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.losses import PairFacts


class Answers(NamedTuple):
    """Axes: n tokens of the A distinct preferred responses of a micro-batch, one response after the other."""

    state_index: Int[Tensor, "n"]
    """The token in front of each, as an index into the flattened input_ids: its state predicts the token."""
    target: Int[Tensor, "n"]
    lengths: Int[Tensor, "A"]
    """Tokens of each response, its end token included; one less where nothing stands before the first."""
    answer_index: Int[Tensor, "B"]
    """Index of the preferred response of each comparison among the A."""


def answers_of(
    fields: dict[str, Any],
    first_scored: np.ndarray,
    responses: np.ndarray,
    table: Ragged,
    preferred: np.ndarray,
) -> Answers:
    """Answers of a padded or packed batch with these token fields, in joint encoding.

    Args:
        fields: token fields of the batch of these responses.
        first_scored: place of the first scored position in each response, int64 [R].
        responses: their row numbers.
        table: token ids of all responses.
        preferred: slot of the preferred response of each comparison, int64 [B].
    """
    slots, answer_index = np.unique(preferred, return_inverse=True)
    start = fields["response_positions"][:, 0].numpy()[slots] - first_scored[slots]
    packing = fields.get("packing")
    if packing is None:
        before = np.where(start > 0, start - 1, -1)
        row = slots * fields["input_ids"].shape[1]
    else:
        prompt = packing.prompt_of_response.numpy()[slots]
        last = packing.sequence_start.numpy()[prompt + 1] - 1
        before, row = np.where(packing.num_before.numpy()[slots] > 0, last, -1), 0 * slots
    places, targets = [], []
    for slot, column, first, offset in zip(slots, start, before, row, strict=True):
        tokens = np.asarray(table[int(responses[slot])], np.int64)
        predicting = offset + np.concatenate([[first], np.arange(column, column + len(tokens) - 1)])
        seen = slice(None) if first >= 0 else slice(1, None)
        places.append(predicting[seen])
        targets.append(tokens[seen])
    return Answers(
        torch.from_numpy(np.concatenate(places)),
        torch.from_numpy(np.concatenate(targets)),
        torch.tensor([len(part) for part in targets]),
        torch.from_numpy(answer_index.reshape(-1)),
    )


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
    """+1 where response_2 is preferred, -1 where response_1, 0 for a tie."""
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
    target: Float[Tensor, "B"] | None = None
    """Share of the preference that response_2 has; None for data in which every label is sure."""
    answers: Answers | None = None
    """The tokens of preferred responses, where the loss asks how likely they are."""

    @property
    def preferred(self) -> Int[Tensor, "B"]:
        """+1 where response_2 is preferred, -1 where response_1, 0 where neither: a tie or a soft label of one half."""
        return self.label if self.target is None else self.label * (self.target != 0.5)

    def facts(self, factor: float = 1.0) -> PairFacts:
        """Return what a loss reads of the comparisons, their weights times `factor`."""
        window = self.window_start, self.window_end
        weight = self.weight * factor
        return PairFacts(self.label, *window, self.required_margin, weight, self.target)

    def to(self, device: torch.device) -> "Batch":
        return _moved(self, device)


def _moved(part: Any, device: torch.device) -> Any:
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    if isinstance(part, tuple):
        inner = [_moved(piece, device) for piece in part]
        return type(part)(*inner) if hasattr(part, "_fields") else tuple(inner)
    return part
