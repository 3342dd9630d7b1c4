"""Models of ties: how likely a user prefers neither response, beside a margin and one learnt threshold.

With m the margin in log-odds, the probabilities that response_2, response_1 or neither is preferred are
    rao_kupper  sigmoid(m - t), sigmoid(-m - t), and the rest: a response must be ahead by t (Rao and Kupper 1967)
    davidson    e^(m/2) / z, e^(-m/2) / z, t / z, with z = e^(m/2) + e^(-m/2) + t (Davidson 1970)
Without one a tie is half a preference each way (`half`), or is left out of the loss (`drop`).
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from pal_ds.heads.jaxtyping_fallback import Float

TieModel = Literal["half", "drop", "rao_kupper", "davidson"]
WITH_THRESHOLD = ("rao_kupper", "davidson")
LEAST_SHARE, LARGEST_SHARE = 0.01, 0.9
"""Shares of ties between which a threshold starts."""


def win_loss(
    margin: Float[Tensor, "*n"], threshold: Float[Tensor, "*#n"] | float, model: TieModel
) -> Float[Tensor, "*n"]:
    """-log of the probability that the response with this lead is preferred; `model` is one with a threshold.

    >>> chances = [(-win_loss(torch.tensor(m), 1.0, "davidson")).exp() for m in (0.5, -0.5)]
    >>> tie = (-tie_loss(torch.tensor(0.5), 1.0, "davidson")).exp()
    >>> round(float(sum(chances) + tie), 4)
    1.0
    """
    if model == "rao_kupper":
        return -nn.functional.logsigmoid(margin - threshold)
    log_threshold = torch.as_tensor(threshold, dtype=margin.dtype, device=margin.device).log()
    terms = [torch.zeros_like(margin), -margin, log_threshold - margin / 2]
    return torch.logsumexp(torch.stack(terms), 0)


def tie_loss(
    margin: Float[Tensor, "*n"], threshold: Float[Tensor, "*#n"] | float, model: TieModel
) -> Float[Tensor, "*n"]:
    """-log of the probability that neither response is preferred, at a margin without a required lead."""
    both = win_loss(margin, threshold, model) + win_loss(-margin, threshold, model)
    threshold = torch.as_tensor(threshold, dtype=margin.dtype, device=margin.device)
    if model == "rao_kupper":
        return both - torch.expm1(2 * threshold).log()
    return both / 2 - threshold.log()


def threshold_of_share(share: float, model: TieModel) -> float:
    """The threshold under which two responses of equal reward tie with this probability.

    >>> threshold = threshold_of_share(0.2, "rao_kupper")
    >>> round(float((-tie_loss(torch.tensor(0.0), threshold, "rao_kupper")).exp()), 4)
    0.2
    """
    share = min(max(share, LEAST_SHARE), LARGEST_SHARE)
    return 2 * math.atanh(share) if model == "rao_kupper" else 2 * share / (1 - share)


class TieThreshold(nn.Module):
    """The threshold of all users: one trained number, positive by its logarithm."""

    def __init__(self, threshold: float = 1.0) -> None:
        super().__init__()
        self.log_threshold = nn.Parameter(torch.tensor([math.log(threshold)]))

    def forward(self) -> Float[Tensor, "1"]:
        """The threshold, fp32."""
        return self.log_threshold.float().exp()
