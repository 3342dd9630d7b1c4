"""Bradley-Terry: one reward for everyone, <v, h(x)>; the baseline of every personalised head."""

import math
from typing import ClassVar, final

import torch
from torch import Tensor, nn

from .base import Features, Head, UserState
from .checks import check_positive
from .geometry import take
from .jaxtyping_fallback import Float


@final
class BradleyTerry(Head):
    """<v, h(x)> without bias (a bias cancels in every margin). Reads nothing of the user."""

    needs: frozenset[str] = frozenset()
    family: ClassVar[str] = "bradley_terry"

    def __init__(self, hidden_size: int):
        """v starts as N(0, 1/H) per coordinate: rewards of unit scale on normed hidden states."""
        super().__init__()
        check_positive("hidden_size", hidden_size)
        self.num_prototypes = 1
        self.direction = nn.Parameter(torch.randn(hidden_size) / math.sqrt(hidden_size))

    def linear_weight(self) -> Float[Tensor, "H"]:
        """v, fp32."""
        return self.direction.float()

    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """Each distinct response is scored once; fp32."""
        score = features.response.float() @ self.direction.float()
        return take(score, features.response_index)
