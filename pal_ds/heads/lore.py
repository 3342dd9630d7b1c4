"""LoRe: a user mixes K linear rewards of one feature space, or adds them with any sign (arXiv 2504.14439)."""

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from .base import Features, Head, UserState
from .checks import check_not_negative, check_positive
from .geometry import take
from .jaxtyping_fallback import Float
from .mixture import Mixture, MixtureEvaluation, MixtureKind
from .sufficient_statistics import MixtureStatistics


@final
class Lore(Head):
    """sum_k s_uk <v_k, h(x)> with s_u of `mixture.py`: PAL with a linear map; K = 1 is Bradley-Terry.

    Signed weights reach users who are against what the population is for; a mixture never is. With `free`, a new user's
    reward is <sum_k s_uk v_k + e_u, h(x)>, e_u their own.
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
        length_weight: float = 0.0,
    ):
        """Raises ValueError for an impossible size or an unknown choice.

        Args:
            hidden_size: H.
            num_prototypes: K, the rank of all users' rewards. Each v_k starts as N(0, 1/H) per coordinate.
            temperature: tau of the mixture.
            mixture: `softmax`, `gumbel`, `signed` or `free`; the last two train alike.
            evaluation: `soft`, or `hard` for the largest logit alone.
            length_weight: penalty per comparison of half the squared length of the user's vector sum_k s_uk v_k: for a
                user of n comparisons a ridge of n times this. Unlike weight decay, it is what Adam's steps settle at.
        """
        super().__init__()
        check_not_negative("length_weight", length_weight)
        check_positive("hidden_size", hidden_size)
        check_positive("num_prototypes", num_prototypes)
        self.num_prototypes = num_prototypes
        self.basis = nn.Parameter(torch.randn(num_prototypes, hidden_size) / math.sqrt(hidden_size))
        self.temperature, self.length_weight = temperature, length_weight
        self.mixture = Mixture(temperature, mixture, evaluation, is_linear=True)
        self.needs, self.space = self.mixture.needs, self.mixture.space
        self.residual_size = hidden_size if mixture == "free" else 0

    def mixture_weights(self, user: UserState) -> Float[Tensor, "B K"]:
        """s_u, and e_u where the state has it; fp32."""
        if user.mixture is not None or user.logits is None:
            return self.mixture(user)
        logits, residual = user.logits.split_with_sizes(self._sizes(user.logits), -1)
        return torch.cat([self.mixture(user._replace(logits=logits)), residual.float()], -1)

    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """Each distinct response meets the basis once; fp32. Raises ValueError for a point of another size."""
        index = features.response_index
        scores, point = take(self._scores(features), index), self.mixture_weights(user)
        weights, residual = point.split_with_sizes(self._sizes(point), -1)
        reward = torch.einsum("bk,brtk->brt", weights, scores)
        if not residual.shape[-1]:
            return reward
        response = take(features.response.float(), index)
        return reward + torch.einsum("bh,brth->brt", residual, response)

    def residual_features(self, features: Features) -> Float[Tensor, "R T H"]:
        """h(x), fp32."""
        return features.response.float()

    def penalty(self, user: UserState, reward: Float[Tensor, "B r T"]) -> Float[Tensor, "B"]:
        """length_weight / 2 ||sum_k s_uk v_k||^2 per comparison, from the K x K inner products of the basis."""
        if not self.length_weight:
            return super().penalty(user, reward)
        basis, weights = self.basis.float(), self.mixture_weights(user)[:, : self.num_prototypes]
        square = ((weights @ (basis @ basis.T)) * weights).sum(-1)
        return 0.5 * self.length_weight * square

    def statistics(self, features: Features) -> MixtureStatistics:
        """The K rewards of each response."""
        scores = self._scores(features)
        unread = scores.new_ones(1, self.num_prototypes, self.num_prototypes)
        shared = torch.zeros(len(scores), dtype=torch.int64, device=scores.device)
        index, tau = features.response_index, self.temperature
        return MixtureStatistics(scores, index, unread, shared, "linear", tau, self.space)

    def _sizes(self, point: Tensor) -> list[int]:
        """Numbers of a point that weigh the basis, and those of a direction of the user's own."""
        size = point.shape[-1] - self.num_prototypes
        if size not in (0, self.residual_size):
            raise ValueError(
                f"a user's point has {point.shape[-1]} numbers; this head's have {self.num_prototypes}"
                + (f", or {self.residual_size} more." if self.residual_size else ".")
            )
        return [self.num_prototypes, size]

    def _scores(self, features: Features) -> Float[Tensor, "R T K"]:
        return features.response.float() @ self.basis.float().T
