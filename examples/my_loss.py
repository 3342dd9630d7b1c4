"""A loss of one's own in the margin, for `loss.shape` of a recipe."""

from torch import Tensor, nn

from pal_ds import MarginLoss


class Focal(MarginLoss):
    """The logistic loss, times (1 - p)^gamma for the probability p of the choice: easy pairs count less."""

    def __init__(self, gamma: float = 1.0) -> None:
        self.gamma = gamma

    def __call__(self, margin: Tensor) -> Tensor:
        """The loss of each signed margin."""
        log_p = nn.functional.logsigmoid(margin)
        return -((1 - log_p.exp()) ** self.gamma) * log_p
