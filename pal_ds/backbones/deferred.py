"""A frozen backbone whose weights are read when the first text needs them, which a full cache never does."""

from collections.abc import Callable

from torch import nn

from pal_ds.data.batch import Batch
from pal_ds.heads.base import Features


class DeferredBackbone(nn.Module):
    """Behaves as the module that `load` gives; holds no parameters until its first forward."""

    def __init__(self, load: Callable[[], nn.Module]) -> None:
        super().__init__()
        self._load = load
        self.loaded: nn.Module | None = None

    def forward(self, batch: Batch) -> Features:
        if self.loaded is None:
            self.loaded = self._load().to(batch.label.device).eval().requires_grad_(False)
        return self.loaded(batch)
