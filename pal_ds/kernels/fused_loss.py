"""Use of the fused pair loss in a training step that knows no head: a loss of where responses and users lie.

A head whose reward is a distance or a cosine can say where its responses and its users' points lie (`Placement`);
the step hands it a loss made for the batch. Other heads never call theirs.
"""

from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pal_ds.kernels.dispatch import covers
from pal_ds.kernels.eager import PairLossOutput
from pal_ds.kernels.pair_loss import pair_loss
from pal_ds.losses import PairFacts, PreferenceLoss


class Placement(Protocol):
    """Distinct responses, which comparison looks at which, each comparison's points, the scale of a cosine."""

    @property
    def response(self) -> Float[Tensor, "R T d"]: ...
    @property
    def response_index(self) -> Int[Tensor, "B 2"]: ...
    @property
    def point(self) -> Float[Tensor, "B g d"]: ...
    @property
    def scale(self) -> Float[Tensor, "1"] | None: ...


class FusedLoss:
    """The loss of a run, computed by the kernel that the dispatch table names."""

    def __init__(self, loss: PreferenceLoss):
        self.loss = loss

    @classmethod
    def where_it_pays(cls, loss: PreferenceLoss, device: torch.device) -> "FusedLoss | None":
        """None on hardware without a row in the dispatch table: the step then stays as it is, to the bit."""
        return cls(loss) if loss.shape is None and covers("pair_loss", device) else None

    def compute(self, placement: Placement, facts: PairFacts) -> PairLossOutput:
        """The pair loss of a placement; `facts.weight` holds every factor of the total."""
        return pair_loss(
            placement.response,
            placement.response_index,
            placement.point,
            facts,
            placement.scale,
            self.loss.kind,
            self.loss.token_weighting,
        )
