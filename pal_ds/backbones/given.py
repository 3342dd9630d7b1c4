"""States that the batch already carries in place of a backbone: vector records, or a frozen backbone's output."""

from torch import nn

from pal_ds.data.batch import Batch
from pal_ds.heads.base import Features


class GivenStates(nn.Module):
    """Passes stored states on as features; it has no parameters."""

    def forward(self, batch: Batch) -> Features:
        assert batch.response_states is not None, "this batch carries token ids, not states"
        return Features(
            batch.response_states,
            batch.response_index,
            batch.prompt_states,
            batch.prompt_index,
            batch.prompt_length,
        )
