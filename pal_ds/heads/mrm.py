"""MRM: weights of K linear rewards that a few steps from a learnt start fit to each user (arXiv 2601.18731).

    r_u(x) = sum_k softmax(w_u)_k <v_k, h(x)>;  w_u after `num_steps` steps w <- w - rate_t grad_w L_u(w) from w_0
    L_u(w) = mean over the user's context of -log sigmoid(r(preferred) - r(rejected))
The loss of the comparison, which is not in the context, is differentiated through the steps (MAML, second order):
start, basis and rates are learnt so that few steps suffice. The paper's published code has Adam's steps of one fixed
rate for these; plain steps with a learnt rate each (as Meta-SGD, arXiv 1707.09835) are ours. The paper's robust
objective, which gives more weight to users who are hard to learn, is left out: it weighs losses of users against each
other, and a head sees one comparison at a time.
"""

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from .base import Features, Head, HeadOutput, UserState
from .checks import check_positive
from .geometry import take
from .jaxtyping_fallback import Float, Int
from .latent_user import context_ends, given_point, reads_points


@final
class Mrm(Head):
    """A user's point is how far their steps led from the start, w_u - w_0: zeros for whom nothing is known of."""

    needs: frozenset[str] = frozenset({"context"})
    family: ClassVar[str] = "mrm"
    space = "linear"

    def __init__(
        self,
        hidden_size: int,
        num_prototypes: int = 5,
        num_steps: int = 3,
        first_rate: float = 10.0,
        num_context: int = 8,
        num_context_scored: int = 8,
    ):
        """Raises ValueError for an impossible size or a rate that is not positive.

        Args:
            hidden_size: H.
            num_prototypes: K, the number of base rewards. Each v_k starts as N(0, 1/H) per coordinate.
            num_steps: steps from the start to a user's weights.
            first_rate: rate of every step before training.
            num_context: comparisons of the user per comparison in training, drawn anew each epoch.
            num_context_scored: comparisons that stand for a user in evaluation, one draw each.
        """
        super().__init__()
        sizes = {"num_prototypes": num_prototypes, "num_steps": num_steps}
        sizes |= {"num_context": num_context, "num_context_scored": num_context_scored}
        for name, value in {"hidden_size": hidden_size, "first_rate": first_rate, **sizes}.items():
            check_positive(name, value)
        self.num_prototypes = num_prototypes
        self.num_context, self.num_context_scored = num_context, num_context_scored
        self.basis = nn.Parameter(torch.randn(num_prototypes, hidden_size) / math.sqrt(hidden_size))
        self.start = nn.Parameter(torch.zeros(num_prototypes))
        self.log_rates = nn.Parameter(torch.full((num_steps,), math.log(first_rate)))

    def mixture_weights(self, user: UserState) -> Float[Tensor, "B K"]:
        """The point given, or kept in a table in place of logits: a shift of the start."""
        return given_point(user)

    def encode(self, features: Features, user: UserState) -> Float[Tensor, "B K"]:
        """Shift of each user's weights from the start after the steps, fp32; 0 for an empty context."""
        preferred, rejected, length = context_ends(features, user)
        gains = (preferred.float() - rejected.float()) @ self.basis.float().T
        return self._shift(gains, length)

    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """Compute rewards for the given points, or for those of the given contexts; fp32."""
        known = reads_points(user)
        point = given_point(user) if known else self.encode(features, user)
        scores = take(features.response.float() @ self.basis.float().T, features.response_index)
        weights = torch.softmax(self.start.float() + point, dim=-1)
        return torch.einsum("bk,brtk->brt", weights, scores)

    def compare(self, features: Features, user: UserState) -> HeadOutput:
        """Compare as `Head.compare` does; with a context also the point."""
        if user.context is None or user.mixture is not None:
            return super().compare(features, user)
        point = self.encode(features, user)
        output = super().compare(features, UserState(mixture=point))
        return output._replace(point=point)

    def _shift(
        self, gains: Float[Tensor, "B N K"], length: Int[Tensor, "B"]
    ) -> Float[Tensor, "B K"]:
        """The steps; `gains` are base rewards of the preferred response minus those of the rejected one."""
        there = torch.arange(gains.shape[1], device=length.device) < length.unsqueeze(-1)
        share = there / length.unsqueeze(-1).clamp(min=1)
        shift = gains.new_zeros(len(gains), self.num_prototypes)
        for rate in self.log_rates.float().exp():
            weights = torch.softmax(self.start.float() + shift, dim=-1)
            margin = torch.einsum("bnk,bk->bn", gains, weights)
            pull = torch.einsum("bn,bnk->bk", share * torch.sigmoid(-margin), gains)
            # Minus the gradient: `pull` taken through the softmax.
            shift = shift + rate * weights * (pull - (weights * pull).sum(-1, keepdim=True))
        return shift
