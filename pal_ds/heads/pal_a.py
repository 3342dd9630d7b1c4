"""PAL-A: users and responses are points of one space; nearer is better (arXiv 2406.08469).

With f the projector, s_u the user's mixture and p_k the prototypes, the user's point is
    f(Pw)  f(sum_k s_uk p_k)      f(P)w  sum_k s_uk f(p_k)      Pw  sum_k s_uk p_k, p_k in R^d
and the reward of hidden state h is
    distance  -||f(h) - a_u||_2             cosine  min(exp(t), 100) cos(f(h), a_u)
"""

from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor, nn

from .base import Features, Head, Placement, UserState
from .checks import check_choice, check_positive
from .geometry import bounded_scale, distance, new_log_scale, take, unit
from .jaxtyping_fallback import Float
from .mixture import Mixture, MixtureEvaluation, MixtureKind
from .projector import Activation, Projector
from .sufficient_statistics import MixtureStatistics, cosine_statistics, distance_statistics

UserPoint = Literal["f(Pw)", "f(P)w", "Pw"]
Similarity = Literal["distance", "cosine"]


@final
class PalA(Head):
    """The ideal-point head. With K = 1 no user can move a margin, user gradients are exactly 0."""

    needs: frozenset[str] = frozenset({"logits"})
    family: ClassVar[str] = "pal_a"

    def __init__(
        self,
        hidden_size: int,
        num_prototypes: int = 4,
        dim: int | None = None,
        num_layers: int = 3,
        activation: Activation = "relu",
        dropout: float = 0.0,
        residual: bool | None = None,
        user_point: UserPoint = "f(Pw)",
        similarity: Similarity = "distance",
        prototype_std: float = 1.0,
        temperature: float = 1.0,
        mixture: MixtureKind = "softmax",
        evaluation: MixtureEvaluation = "soft",
        bound: float | None = None,
        bound_weight: float = 1.0,
    ):
        """Raises ValueError for an impossible size or an unknown choice.

        Args:
            hidden_size: H, the width of the backbone's hidden states.
            num_prototypes: K.
            dim: d, the width of the reward space; H where unset.
            num_layers: linear layers of f.
            activation: between the layers of f.
            dropout: after each activation of f.
            residual: f(x) = x + layers(x); needs d = H, and unset means wherever d = H. Without it
                three layers of a default start flatten the space and learn slower.
            user_point: where prototypes are mixed, see the module's first lines.
            similarity: `distance` or `cosine`; t of the cosine scale starts at log(1 / 0.07).
            prototype_std: prototypes start as N(0, std^2) per coordinate. 1 is the scale of hidden states after a
                final norm; for embeddings of length 1 take 1 / sqrt(H), lest every response look equally far.
            temperature: tau of the mixture.
            mixture: `softmax`, `gumbel` or `signed`; signed weights sum to 1 but for cosines with `Pw` or `f(P)w`.
            evaluation: `soft`, or `hard` for the largest logit alone.
            bound: penalise user points longer than this; unset means no penalty.
            bound_weight: penalty per unit of excess length and comparison.
        """
        super().__init__()
        check_positive("num_prototypes", num_prototypes)
        check_positive("prototype_std", prototype_std)
        check_choice("user_point", user_point, get_args(UserPoint))
        check_choice("similarity", similarity, get_args(Similarity))
        if bound is not None:
            check_positive("bound", bound)
            check_positive("bound_weight", bound_weight)
        dim = hidden_size if dim is None else dim
        residual = dim == hidden_size if residual is None else residual
        self.num_prototypes, self.temperature, self.bound = num_prototypes, temperature, bound
        self.user_point, self.similarity, self.bound_weight = user_point, similarity, bound_weight
        self.projector = Projector(hidden_size, dim, num_layers, activation, dropout, residual)
        # `f(Pw)` mixes before f, of which one layer is affine, and weights that sum to 1 pass through it; more are not.
        self.has_statistics = user_point != "f(Pw)" or num_layers == 1
        needs_sum = similarity == "distance" or user_point == "f(Pw)"
        self.mixture = Mixture(temperature, mixture, evaluation, sums_to_one=needs_sum)
        self.needs, self.space = self.mixture.needs, self.mixture.space
        width = dim if user_point == "Pw" else hidden_size
        self.prototypes = nn.Parameter(prototype_std * torch.randn(num_prototypes, width))
        self.log_scale = new_log_scale() if similarity == "cosine" else None

    def mixture_weights(self, user: UserState) -> Float[Tensor, "B K"]:
        """s_u, fp32."""
        return self.mixture(user)

    def locate(self, user: UserState) -> Float[Tensor, "B d"]:
        """The user's point a_u, fp32."""
        weights = self.mixture(user)
        if self.user_point == "f(P)w":
            return weights @ self.projector(self.prototypes).float()
        mixed = weights @ self.prototypes.float()
        return mixed if self.user_point == "Pw" else self.projector(mixed).float()

    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """Minus the distance to the user's point, or the scaled cosine with it; fp32."""
        point = self.locate(user)[:, None, None, :]
        # Each distinct response is projected once, however many comparisons look at it.
        projected = self.projector(features.response).float()
        if self.log_scale is None:
            return -distance(take(projected, features.response_index), point)
        response = take(unit(projected), features.response_index)
        return bounded_scale(self.log_scale) * (response * unit(point)).sum(-1)

    def place(self, features: Features, user: UserState) -> Placement:
        """Projected responses and a_u."""
        scale = None if self.log_scale is None else bounded_scale(self.log_scale)
        projected = self.projector(features.response)
        return Placement(projected, features.response_index, self.locate(user).unsqueeze(1), scale)

    def statistics(self, features: Features) -> MixtureStatistics | None:
        """By the K points that are mixed."""
        if not self.has_statistics:
            return None
        points = self.prototypes if self.user_point == "Pw" else self.projector(self.prototypes)
        response, index = self.projector(features.response), features.response_index
        tau, space = self.temperature, self.space
        if self.log_scale is None:
            return distance_statistics(response, index, points, tau, space)
        owner, scale = index.new_zeros(len(response)), bounded_scale(self.log_scale)
        return cosine_statistics(response, index, points[None], owner, scale, tau, space)

    def penalty(self, user: UserState, reward: Float[Tensor, "B r T"]) -> Float[Tensor, "B"]:
        """bound_weight * max(0, ||a_u||_2 - bound) per comparison; zeros where no bound is set.

        The point is computed again (B rows of f); with dropout that is a draw of its own.
        """
        if self.bound is None:
            return super().penalty(user, reward)
        length = torch.linalg.vector_norm(self.locate(user), dim=-1)
        return self.bound_weight * (length - self.bound).relu()
