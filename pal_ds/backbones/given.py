"""Backbones without weights of their own: the batch carries the states, or weights are read when a text needs them."""

from collections.abc import Callable

from torch import nn

from pal_ds.data.batch import Batch
from pal_ds.heads.base import Features


class GivenStates(nn.Module):
    """Passes on states of vector records, or a frozen backbone's stored ones, as features."""

    def forward(self, batch: Batch) -> Features:
        assert batch.response_states is not None, "this batch carries token ids, not states"
        prompt = batch.prompt_states, batch.prompt_index, batch.prompt_length
        return Features(batch.response_states, batch.response_index, *prompt)


class DeferredBackbone(nn.Module):
    """A frozen backbone that `load` gives when the first text needs it, which a full cache never does."""

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        super().__init__()
        self._load = load
        self.loaded: nn.Module | None = None

    def forward(self, batch: Batch) -> Features:
        if self.loaded is None:
            self.loaded = self._load().to(batch.label.device).eval().requires_grad_(False)
        return self.loaded(batch)
