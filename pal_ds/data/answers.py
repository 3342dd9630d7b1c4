"""The tokens of preferred responses, and where in a batch the state lies that predicts each of them."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.ragged import Ragged
from pal_ds.heads.jaxtyping_fallback import Int


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
