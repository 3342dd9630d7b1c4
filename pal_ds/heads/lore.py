"""LoRe: a user mixes K linear rewards of one feature space, or adds them with any sign (arXiv 2504.14439)."""

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from .base import Features, Head, UserState
from .checks import check_positive
from .geometry import take
from .jaxtyping_fallback import Float
from .mixture import Mixture, MixtureEvaluation, MixtureKind
from .sufficient_statistics import MixtureStatistics


@final
class Lore(Head):
    """sum_k s_uk <v_k, h(x)> with s_u of `mixture.py`: PAL with a linear map; K = 1 is Bradley-Terry.

    Signed weights reach users who are against what the population is for; a mixture never is.
    """

    needs: frozenset[str] = frozenset({"logits"})
    family: ClassVar[str] = "lore"
    has_statistics = True

    def __init__(
        self,
        hidden_size: int,
        num_prototypes: int = 5,
        temperature: float = 1.0,
        mixture: MixtureKind = "softmax",
        evaluation: MixtureEvaluation = "soft",
    ):
        """Raises ValueError for an impossible size or an unknown choice.

        Args:
            hidden_size: H.
            num_prototypes: K, the rank of all users' rewards. Each v_k starts as N(0, 1/H) per coordinate.
            temperature: tau of the mixture.
            mixture: `softmax`, `gumbel` or `signed`.
            evaluation: `soft`, or `hard` for the largest logit alone.
        """
        super().__init__()
        check_positive("hidden_size", hidden_size)
        check_positive("num_prototypes", num_prototypes)
        self.num_prototypes = num_prototypes
        self.basis = nn.Parameter(torch.randn(num_prototypes, hidden_size) / math.sqrt(hidden_size))
        self.temperature = temperature
        self.mixture = Mixture(temperature, mixture, evaluation)
        self.needs, self.space = self.mixture.needs, self.mixture.space

    def mixture_weights(self, user: UserState) -> Float[Tensor, "B K"]:
        """s_u, fp32."""
        return self.mixture(user)

    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """Each distinct response meets the basis once; fp32."""
        scores = take(self._scores(features), features.response_index)
        return torch.einsum("bk,brtk->brt", self.mixture(user), scores)

    def statistics(self, features: Features) -> MixtureStatistics:
        """The K rewards of each response."""
        scores = self._scores(features)
        unread = scores.new_ones(1, self.num_prototypes, self.num_prototypes)
        shared = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        index, tau = features.response_index, self.temperature
        return MixtureStatistics(scores, index, unread, shared, "linear", tau, self.space)

    def _scores(self, features: Features) -> Float[Tensor, "R T K"]:
        return features.response.float() @ self.basis.float().T
