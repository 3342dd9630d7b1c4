"""Parts of heads that infer a user's point from other comparisons of the user: what they read, and a prior's weight."""

import math
from typing import Literal

from torch import Tensor

from .base import Features, UserState
from .geometry import take
from .jaxtyping_fallback import Float

KlSchedule = Literal["constant", "linear", "cosine"]
COSINE_BASE = 0.1
"""Start value of the cyclic cosine, as published."""


def context_ends(features: Features, user: UserState) -> tuple[Tensor, Tensor, Tensor]:
    """(preferred [B, N, H], rejected, how many of the N count [B]), at the end of each response of the context.

    Raises ValueError for a user state without comparisons.
    """
    if user.context is None or user.context_length is None:
        raise ValueError("this head reads other comparisons of the user: the user state has none.")
    ends = features.response[:, -1]
    return (
        take(ends, user.context[..., 0]),
        take(ends, user.context[..., 1]),
        user.context_length,
    )


def reads_points(user: UserState) -> bool:
    """True if the state says where the user is, so that no context need be read."""
    return user.mixture is not None or user.logits is not None


def given_point(user: UserState) -> Float[Tensor, "B K"]:
    """The point given, or kept in a table in place of logits, fp32. Raises ValueError where there is none."""
    given = user.mixture if user.mixture is not None else user.logits
    if given is None:
        raise ValueError("this head needs a user: pass a point, or a context to `encode`.")
    return given.float()


def kl_share(schedule: KlSchedule, period: int, update: int | None) -> float:
    """s(t) of the divergence from the prior: 1; t / period up to 1; or cyclic from 0.1 to 1 by half a cosine.

    1 outside training, where there is no update.
    """
    if update is None or schedule == "constant":
        return 1.0
    if schedule == "linear":
        return min(1.0, update / period)
    turn = update % period / period
    return COSINE_BASE + (1 - COSINE_BASE) * (1 + math.cos(math.pi * (turn - 1))) / 2
