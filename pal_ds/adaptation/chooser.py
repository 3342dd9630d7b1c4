"""A strategy on a pool of candidates that has been read: the choice for some users at a time."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pal_ds.adaptation.strategies import (
    GAINS,
    Choice,
    Prompts,
    Strategy,
    choose_at_random,
    choose_by_gain,
    choose_duels,
)
from pal_ds.data.plan import keyed_generator
from pal_ds.heads.jaxtyping_fallback import Bool, Float
from pal_ds.inference.posterior_file import REACH, axes_of
from pal_ds.inference.rewards_at import ScoredPairs

NUM_DRAWS = 32
"""Draws of a user's posterior, for duels."""
FLOATS_AT_ONCE = 2**22
"""Rewards that are in memory at once: 16 MB, of which a few copies are held."""


class Users(NamedTuple):
    """Users who are asked."""

    ids: list[str]
    point: Float[Tensor, "U K"]
    covariance: Float[Tensor, "U K K"]
    log_reliability: Float[Tensor, "U"] | None = None
    """r_u; None where the run's users have none."""

    def some(self, part: slice) -> "Users":
        r = self.log_reliability
        return Users(
            self.ids[part],
            self.point[part],
            self.covariance[part],
            None if r is None else r[part],
        )


class Chooser(NamedTuple):
    """A strategy on a pool that has been read."""

    strategy: Strategy
    num: int
    seed: int
    scored: ScoredPairs
    prompts: Prompts

    def choose(self, users: Users, available: Bool[Tensor, "U C"]) -> Choice:
        """Candidates for each user, `num` of them."""
        if self.strategy == "random":
            return choose_at_random(self._noise(users), self.num, available)
        axes = axes_of(users.covariance)
        if self.strategy == "thompson":
            normals = keyed_generator("ask", self.seed).standard_normal((NUM_DRAWS, axes.shape[1]))
            draws = torch.from_numpy(normals).float() @ axes
            points = users.point[:, None] + draws
            rewards = self.scored.table.at(points.flatten(0, 1)).unflatten(0, points.shape[:2])
            shares = self.prompts.shares_of_best(rewards)
            sides, noise = self.scored.sides, self._noise(users)
            return choose_duels(shares, sides, noise, num=self.num, available=available)
        margin, slopes = margins_with_slopes(self.scored, users.point, axes)
        if users.log_reliability is not None:
            # What a careless user says tells little.
            factor = users.log_reliability.exp()[:, None]
            margin, slopes = factor * margin, factor.unsqueeze(2) * slopes
        return choose_by_gain(margin, slopes, self.num, GAINS[self.strategy], available)

    def _noise(self, users: Users) -> Float[Tensor, "U C"]:
        """Uniform numbers of each user's own: who else is asked does not matter."""
        count = len(self.scored.sides)
        noise = [keyed_generator("ask", self.seed, u).random(count, np.float32) for u in users.ids]
        return torch.from_numpy(np.stack(noise))

    @property
    def users_at_once(self) -> int:
        """Users whose rewards fill about FLOATS_AT_ONCE."""
        width = max(int(self.scored.sides.max()) + 1, len(self.scored.sides))
        return max(1, FLOATS_AT_ONCE // (width * NUM_DRAWS))


def margins_with_slopes(
    scored: ScoredPairs, point: Float[Tensor, "U K"], axes: Float[Tensor, "U D K"]
) -> tuple[Float[Tensor, "U C"], Float[Tensor, "U D C"]]:
    """Margins at the users' points, and how much they change along each axis."""
    far = REACH * axes
    places = torch.cat([point[:, None], point[:, None] + far, point[:, None] - far], 1)
    margins = scored.margins(places.flatten(0, 1)).unflatten(0, places.shape[:2])
    up, down = margins[:, 1:].chunk(2, 1)
    return margins[:, 0], (up - down).div_(2 * REACH)
