"""A head of one's own, in a file outside the package.

A recipe names it by its import path (`my_head.yaml`); from Python it is a class:

    from my_head import Centred
    run = train("my_head.yaml", "runs/mine", head=Centred, trust_code=True)

A folder that `consolidate` makes holds this file without pal_ds around it, so a head imports torch, names of
pal_ds.heads (`Head` also from pal_ds), and files beside it, each as `from MODULE import NAME`.
"""

import torch
from torch import Tensor, nn

from pal_ds import Head
from pal_ds.heads import Features, UserState


class Centred(Head):
    """A user mixes K points; the reward is minus the squared distance to the mixture, in a space of `dim` numbers.

    `num_prototypes` (K) and `needs` are what every head says of itself: here the logits of the user table are read,
    so new users are adapted as they are for PAL-A.
    """

    needs = frozenset({"logits"})

    def __init__(self, hidden_size: int, num_prototypes: int = 3, dim: int = 8) -> None:
        super().__init__()
        self.num_prototypes = num_prototypes
        self.map = nn.Linear(hidden_size, dim)
        self.points = nn.Parameter(torch.randn(num_prototypes, dim))

    def mixture_weights(self, user: UserState) -> Tensor:
        """s_u [B, K]: the user's point of the simplex, given or made from the logits."""
        if user.mixture is not None:
            return user.mixture
        assert user.logits is not None
        return user.logits.softmax(-1)

    def reward(self, features: Features, user: UserState) -> Tensor:
        """Rewards [B, 2, T], fp32, from the states [R, T, H] of the distinct responses of a batch."""
        place = self.map(features.response.float())[features.response_index]  # [B, 2, T, dim]
        centre = (self.mixture_weights(user).float() @ self.points.float())[:, None, None]
        return -(place - centre).square().sum(-1)
