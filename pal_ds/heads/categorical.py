"""Distributional preference learning, categorical form: a distribution over utilities (arXiv 2312.08358)."""

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from .base import Features, Head, HeadOutput, UserState
from .checks import check_not_negative, check_positive
from .geometry import take
from .jaxtyping_fallback import Float

SMALLEST_PROBABILITY = 1e-30


@final
class Categorical(Head):
    """Utility of a response is one of A evenly spaced atoms in [0, 1]; one distribution for everyone.

    P(response_2 > response_1) = sum_ij p2_j p1_i C_ij with C_ij = 1 for j > i and 1/2 for j = i; the margin is its
    log-odds. The reward is the expected utility.
    """

    needs: frozenset[str] = frozenset()
    family: ClassVar[str] = "categorical"

    def __init__(self, hidden_size: int, num_atoms: int = 10, entropy_weight: float = 0.1):
        """Raises ValueError for an impossible size or a negative weight.

        Args:
            hidden_size: H.
            num_atoms: A, at least 2.
            entropy_weight: of the entropy of a comparison's mean distribution at the last position, which is
                maximised (against mass on one atom). The published code takes the mean over a micro-batch; here a
                comparison's loss depends on the comparison alone, however an update is split.
        """
        super().__init__()
        check_positive("hidden_size", hidden_size)
        if num_atoms < 2:
            raise ValueError(f"num_atoms is {num_atoms}; it must be at least 2.")
        check_not_negative("entropy_weight", entropy_weight)
        self.num_prototypes = 1
        self.num_atoms, self.entropy_weight = num_atoms, entropy_weight
        self.weight = nn.Parameter(torch.randn(num_atoms, hidden_size) / math.sqrt(hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_atoms))

    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """Expected utilities in [0, 1], fp32."""
        return self._expected(self._distributions(features))

    def compare(self, features: Features, user: UserState) -> HeadOutput:
        """Margins are log-odds of one draw exceeding another, a tie counting half."""
        p = self._distributions(features)
        won, lost = _exceeds(p[:, 1], p[:, 0]), _exceeds(p[:, 0], p[:, 1])
        marginal = p[:, :, -1].mean(1)
        entropy = -torch.special.xlogy(marginal, marginal).sum(-1)
        return HeadOutput(self._expected(p), _log(won) - _log(lost), -self.entropy_weight * entropy)

    def _distributions(self, features: Features) -> Float[Tensor, "B r T A"]:
        logits = features.response.float() @ self.weight.float().T + self.bias.float()
        return torch.softmax(take(logits, features.response_index), dim=-1)

    def _expected(self, p: Float[Tensor, "B r T A"]) -> Float[Tensor, "B r T"]:
        return p @ torch.linspace(0, 1, self.num_atoms, device=p.device)


def _exceeds(p: Float[Tensor, "B T A"], q: Float[Tensor, "B T A"]) -> Float[Tensor, "B T"]:
    """P(a draw of p > a draw of q) + P(equal) / 2."""
    return (p * (q.cumsum(-1) - q / 2)).sum(-1)


def _log(probability: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    return probability.clamp(min=SMALLEST_PROBABILITY).log()
