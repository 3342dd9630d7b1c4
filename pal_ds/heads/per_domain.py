"""One linear reward per domain: DSP's customised reward models on a shared backbone (arXiv 2309.03126)."""

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from .base import Features, Head, UserState
from .checks import check_positive
from .geometry import take
from .jaxtyping_fallback import Float


@final
class PerDomain(Head):
    """<v_g, h(x)> for the group g of the comparison; the mean over all domains where it has none.

    DSP trains a whole model per domain; that is a chain of runs (`train.init_from`). Here domains share one backbone. A
    mixture, given to score or export, weighs the domains.
    """

    needs: frozenset[str] = frozenset({"group"})
    family: ClassVar[str] = "per_domain"

    def __init__(self, hidden_size: int, num_prototypes: int = 4):
        """Raises ValueError for an impossible size.

        Args:
            hidden_size: H.
            num_prototypes: domains, at least as many as the data has groups. Each v_g starts as N(0, 1/H) per
                coordinate.
        """
        super().__init__()
        check_positive("hidden_size", hidden_size)
        check_positive("num_prototypes", num_prototypes)
        self.num_prototypes = num_prototypes
        self.directions = nn.Parameter(
            torch.randn(num_prototypes, hidden_size) / math.sqrt(hidden_size)
        )

    def mixture_weights(self, user: UserState) -> Float[Tensor, "B K"]:
        """The given mixture, else all weight on the group; even weights where there is neither."""
        if user.mixture is not None:
            return user.mixture.float()
        even = 1.0 / self.num_prototypes
        if user.group is None:
            num_rows = 1 if user.logits is None else len(user.logits)
            return torch.full((num_rows, self.num_prototypes), even, device=self.directions.device)
        known = (user.group >= 0).unsqueeze(-1)
        domain = nn.functional.one_hot(user.group.clamp(min=0), self.num_prototypes).float()
        return torch.where(known, domain, even)

    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """Each distinct response is scored once for all domains; fp32."""
        scores = features.response.float() @ self.directions.float().T
        scores = take(scores, features.response_index)
        return torch.einsum("bk,brtk->brt", self.mixture_weights(user), scores)
