"""The recipe's `users` part."""

import math
from dataclasses import dataclass
from typing import Literal, NotRequired, TypedDict, get_args

from pal_ds.errors import UserError

Scalar = Literal["reliability", "tie_threshold"]
SCALARS: tuple[Scalar, ...] = get_args(Scalar)
"""Positive numbers that a user may have beside a point, each by a key of this part. A row of the table holds the
logarithm, `log_NAME`, behind the logits, in this order."""
BYTES_REPLICATED = 2**31
"""A table of up to so many bytes is held whole by every rank, unless the recipe says how many rows may be."""


class RowPriorState(TypedDict):
    """Everything of the prior of `row_prior.py` that a resumed run needs."""

    mean: list[float]
    precision: list[list[float]]
    reliability_variance: NotRequired[float]
    """Where users have a reliability."""
    tie_threshold_variance: NotRequired[float]
    """Where users have a threshold of ties of their own."""


@dataclass(frozen=True)
class UsersConfig:
    """Settings of user logits: how they start and learn, and where they lie."""

    learning_rate: float = 5e-2
    """Peak rate of the rows' own Adam; it follows the model's schedule. One update moves a logit by
    about this much at most, so a user settles in tens of comparisons."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments, counted in the row's own updates."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    init_std: float = 1.0
    """Spread of a new user's logits, as in the reference. On synthetic ideal points with 6 and 30
    comparisons per user, 0 and 0.1 were no better (at 6, half a point of accuracy worse): the
    spread parts the prototypes early. 0 starts every user at the even mixture."""
    max_row_norm: float | None = None
    """Bound on the norm of a user's summed gradient in one update; unset means no bound. Adam
    divides by the gradient's scale, so this matters only against outliers."""
    prior: Literal["none", "learnt"] = "none"
    """`learnt`: rows are pulled towards the mean of all, the more the fewer comparisons a user has and the less users
    differ (empirical Bayes); see `row_prior.py`. `none`: each row is fitted to its comparisons alone."""
    reliability: Literal["none", "learnt"] = "none"
    """`learnt`: a user's margins are multiplied by a factor exp(r) of the user's own, near 0 for careless users and
    large for careful ones; r is normal around 0. Its standard deviation is learnt with `prior: learnt`, else 0.5. For
    every head, under the logistic loss."""
    tie_threshold: Literal["none", "learnt"] = "none"
    """`learnt`: the run's threshold of ties is multiplied by a factor exp(q) of the user's own, above 1 for users who
    are often undecided; q is normal around 0, with a standard deviation as of `reliability`. For every head, where
    `loss.ties` has a threshold. `adapt` does not fit it: a new user has the factor 1."""
    generic_fraction: float = 0.0
    """Probability that a comparison is also trained for the user `population`, who is what users of whom nothing is
    known get (arXiv 2402.05133); 0: they get the mean of all mixtures."""
    shard_rows_above: int | None = None
    """With more users than this each rank holds a slice of the table, else all of it; execution only. Unset: above
    2 GiB, which is 20 million users at K = 8 and 2.7 million at K = 64. A sharded table asks for one more collective
    per update, over that update's rows."""

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        for name in ("learning_rate", "epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(
                    f"users.{name} is {getattr(self, name)}; it must be above 0, and finite."
                )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"users.betas is {self.betas}; both must be at least 0 and below 1.")
        if not 0 <= self.init_std < math.inf:
            raise UserError(f"users.init_std is {self.init_std}; it must be 0 or more, and finite.")
        if not 0 <= self.generic_fraction <= 1:
            raise UserError(
                f"users.generic_fraction is {self.generic_fraction}; it must be between 0 and 1."
            )
        if self.max_row_norm is not None and not self.max_row_norm > 0:
            raise UserError(
                f"users.max_row_norm is {self.max_row_norm}; it must be above 0, or unset."
            )
        if self.shard_rows_above is not None and self.shard_rows_above < 0:
            raise UserError(
                f"users.shard_rows_above is {self.shard_rows_above}; it must be 0 or more, or unset."
            )

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """Names of `SCALARS` that a row holds behind the logits."""
        return tuple(name for name in SCALARS if getattr(self, name) == "learnt")

    @property
    def has_reliability(self) -> bool:
        """True where users have a reliability."""
        return "reliability" in self.scalars

    def rows_replicated(self, bytes_per_row: int) -> int:
        """Most users whose table every rank holds whole."""
        if self.shard_rows_above is not None:
            return self.shard_rows_above
        return BYTES_REPLICATED // bytes_per_row
