"""VRF: a user is a normal distribution; its distances to K others weigh K linear rewards (arXiv 2604.00997).

    q_u = N(mu, diag sigma^2) from the user's context;  bases N(m_k, diag s_k^2), learnt
    W_uk = ||mu - m_k||^2 + ||sigma - s_k||^2, the squared 2-Wasserstein distance
    r_u(x) = sum_k softmax(-W_u / distance_scale)_k <v_k, h(x)>
    margin = (r_u(x_2) - r_u(x_1)) / sqrt(1 + pi / 8 mean sigma^2);  penalty = kl_weight KL(q_u || N(0, 1))
Built from the paper's abstract, as its equations were not at hand: distributions by a variational encoder, weights by
Wasserstein distances, and a loss that counts less for users who are uncertain are the paper's. Ours: the encoder, which
is VPL's with odd symmetry, the softmax, and the form of that loss, MacKay's (1992) for a logistic under a normal.
"""

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from .base import Features, Head, HeadOutput, UserState
from .checks import check_not_negative, check_positive
from .context_encoder import ContextEncoder
from .geometry import take
from .jaxtyping_fallback import Float
from .latent_user import context_ends, given_point, reads_points


@final
class Vrf(Head):
    """A user's point is mu and log sigma^2, 2 L numbers: zeros, the prior, for whom nothing is known of."""

    needs: frozenset[str] = frozenset({"context"})
    family: ClassVar[str] = "vrf"
    space = "linear"

    def __init__(
        self,
        hidden_size: int,
        num_bases: int = 5,
        latent_dim: int = 8,
        width: int = 128,
        num_context: int = 8,
        num_context_scored: int = 8,
        distance_scale: float = 1.0,
        kl_weight: float = 1e-3,
    ):
        """Raises ValueError for an impossible size or weight.

        Args:
            hidden_size: H.
            num_bases: K. Each v_k starts as N(0, 1/H) per coordinate, each m_k as N(0, 1), each s_k as 1.
            latent_dim: L.
            width: of the encoder's hidden layers.
            num_context: comparisons of the user per comparison in training, drawn anew each epoch.
            num_context_scored: comparisons that stand for a user in evaluation, one draw each.
            distance_scale: squared distance by which one base must be nearer than another to weigh e times as much.
            kl_weight: of the divergence from the prior, summed over L.
        """
        super().__init__()
        sizes = {"num_bases": num_bases, "latent_dim": latent_dim, "width": width}
        sizes |= {"num_context": num_context, "num_context_scored": num_context_scored}
        for name, value in {"hidden_size": hidden_size, **sizes}.items():
            check_positive(name, value)
        check_positive("distance_scale", distance_scale)
        check_not_negative("kl_weight", kl_weight)
        self.num_prototypes = 2 * latent_dim
        self.num_context, self.num_context_scored = num_context, num_context_scored
        self.distance_scale, self.kl_weight = distance_scale, kl_weight
        self.encoder = ContextEncoder(hidden_size, width, latent_dim, "odd")
        self.rewards = nn.Parameter(torch.randn(num_bases, hidden_size) / math.sqrt(hidden_size))
        self.base_mean = nn.Parameter(torch.randn(num_bases, latent_dim))
        self.base_logvar = nn.Parameter(torch.zeros(num_bases, latent_dim))

    def mixture_weights(self, user: UserState) -> Float[Tensor, "B K"]:
        """The point given, or kept in a table in place of logits."""
        return given_point(user)

    def encode(self, features: Features, user: UserState) -> Float[Tensor, "B K"]:
        """mu and log sigma^2 of each context, fp32; 0 for an empty one."""
        return torch.cat(self.encoder(*context_ends(features, user)), dim=-1)

    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """Compute rewards for the given points, or for those of the given contexts; fp32."""
        return self._reward(features, self._point(features, user))

    def compare(self, features: Features, user: UserState) -> HeadOutput:
        """Margins are less sure where the user is; with a context also the divergence as the penalty and the point."""
        point = self._point(features, user)
        reward = self._reward(features, point)
        mu, logvar = point.chunk(2, dim=-1)
        variance = logvar.exp()
        sureness = (1 + math.pi / 8 * variance.mean(-1, keepdim=True)).rsqrt()
        margin = (reward[:, 1] - reward[:, 0]) * sureness
        if reads_points(user):
            return HeadOutput(reward, margin, self.penalty(user, reward))
        divergence = 0.5 * (mu.square() + variance - 1 - logvar).sum(-1)
        return HeadOutput(reward, margin, self.kl_weight * divergence, None, point)

    def _point(self, features: Features, user: UserState) -> Float[Tensor, "B K"]:
        return given_point(user) if reads_points(user) else self.encode(features, user)

    def _reward(self, features: Features, point: Float[Tensor, "B K"]) -> Float[Tensor, "B r T"]:
        mu, logvar = point.unsqueeze(1).chunk(2, dim=-1)
        spread, base_spread = (logvar / 2).exp(), (self.base_logvar.float() / 2).exp()
        distance = (mu - self.base_mean.float()).square() + (spread - base_spread).square()
        weights = torch.softmax(-distance.sum(-1) / self.distance_scale, dim=-1)
        scores = take(features.response.float() @ self.rewards.float().T, features.response_index)
        return torch.einsum("bk,brtk->brt", weights, scores)
