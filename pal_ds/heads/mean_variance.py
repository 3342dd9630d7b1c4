"""Distributional preference learning, normal form: a mean and a variance per response (arXiv 2312.08358)."""

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from .base import Features, Head, HeadOutput, UserState
from .checks import check_not_negative, check_positive
from .geometry import take
from .jaxtyping_fallback import Float


@final
class MeanVariance(Head):
    """Utility of a response ~ N(m, softplus(s)^2) over annotators; one distribution for everyone.

    P(response_2 > response_1) = Phi((m_2 - m_1) / sqrt(sd_1^2 + sd_2^2)), exactly: the margin is its log-odds, so the
    logistic loss of the margin is -log P. The reward is the mean.
    """

    needs: frozenset[str] = frozenset()
    family: ClassVar[str] = "mean_variance"

    def __init__(self, hidden_size: int, variance_penalty: float = 0.0):
        """Raises ValueError for an impossible size or a negative weight.

        Args:
            hidden_size: H.
            variance_penalty: weight of sd_1^2 + sd_2^2 in the loss, at the last position.
        """
        super().__init__()
        check_positive("hidden_size", hidden_size)
        check_not_negative("variance_penalty", variance_penalty)
        self.num_prototypes = 1
        self.variance_penalty = variance_penalty
        self.weight = nn.Parameter(torch.randn(2, hidden_size) / math.sqrt(hidden_size))
        self.bias = nn.Parameter(torch.zeros(2))

    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """The means, fp32."""
        return self._moments(features)[0]

    def compare(self, features: Features, user: UserState) -> HeadOutput:
        """Margins are log-odds of the normal difference."""
        mean, deviation = self._moments(features)
        variance = deviation.square().sum(1)
        distance = (mean[:, 1] - mean[:, 0]) * variance.rsqrt()
        log_ndtr = torch.special.log_ndtr
        penalty = self.variance_penalty * variance[:, -1]
        return HeadOutput(mean, log_ndtr(distance) - log_ndtr(-distance), penalty)

    def _moments(self, features: Features) -> tuple[Tensor, Tensor]:
        """(means, standard deviations) [B, r, T], fp32."""
        both = features.response.float() @ self.weight.float().T + self.bias.float()
        both = take(both, features.response_index)
        # A deviation that underflows would divide by zero where both do.
        return both[..., 0], nn.functional.softplus(both[..., 1]).clamp(min=1e-6)
