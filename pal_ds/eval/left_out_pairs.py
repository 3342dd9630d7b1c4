"""Margins of comparisons by a regression on those of the user's others that share no response with them.

A pair that is left out by itself is known all the same where its responses are met in other pairs: who likes a better
than b and b better than c said how a compares with c. So whatever shares a response is left out with it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pal_ds.heads.jaxtyping_fallback import Float, Int

Covariances = Callable[[Int[Tensor, "c"], Int[Tensor, "c g"]], Float[Tensor, "c g g"]]
"""Laplace's covariance of the margins of g comparisons of one user, for c users of a batch: (users, places)."""


class Sharing(NamedTuple):
    """For each comparison, the comparisons of its user that share a response with it, itself among them."""

    comparison: Int[np.ndarray, "s"]
    first: Int[np.ndarray, "n+1"]
    """Place in `comparison` of each comparison's first, and the end."""

    @staticmethod
    def of(responses: Int[np.ndarray, "n 2"], owner: Int[np.ndarray, "n"]) -> "Sharing":
        """Find them from the two responses and the user of each comparison."""
        num = len(owner)
        keys = (owner * (responses.max(initial=0) + 1))[:, None] + responses
        _, met = np.unique(keys.T.ravel(), return_inverse=True)
        order, counts = np.argsort(met, kind="stable"), np.bincount(met)
        begin = np.cumsum(counts) - counts
        length = counts[met]
        one = np.repeat(np.tile(np.arange(num), 2), length)
        step = np.arange(len(one)) - np.repeat(np.cumsum(length) - length, length)
        other = order[np.repeat(begin[met], length) + step] % max(num, 1)
        # A pair of the same two responses is met at both.
        pairs = np.unique(one * num + other)
        return Sharing(pairs % max(num, 1), np.searchsorted(pairs, np.arange(num + 1) * num))

    @property
    def counts(self) -> Int[np.ndarray, "n"]:
        return np.diff(self.first)

    def within(
        self, comparisons: Int[np.ndarray, "G n"], is_one: np.ndarray, size: int
    ) -> tuple[Int[np.ndarray, "G n g"], np.ndarray]:
        """Columns of `comparisons`, a user's in each row, of those shared with each, padded to g; which are no padding.

        `is_one` is False, bool [G, n], where a row is padded itself.
        """
        columns = np.zeros(len(self.first) - 1, np.int64)
        columns[comparisons[is_one]] = np.nonzero(is_one)[1]
        slot = np.arange(size)
        is_shared = (slot < self.counts[comparisons][..., None]) & is_one[..., None]
        place = np.minimum(self.first[comparisons][..., None] + slot, len(self.comparison) - 1)
        return np.where(is_shared, columns[self.comparison[place]], 0), is_shared


def left_out_margins(
    margins: Float[Tensor, "G n"],
    covariances: Covariances,
    places: Int[Tensor, "G n g"],
    present: Tensor,
    *,
    floats_per_part: int,
) -> Float[Tensor, "G n"]:
    """Margin of each comparison without the likelihood of those at `places`, by one step of Newton's back.

    With V the covariance of these margins, W their curvatures and g their gradients, the margins fall by
    V (I - W V)^-1 g (Rad and Maleki 2020, for more than one left out).

    Args:
        margins: at the minimum of each user's objective; fp64.
        covariances: of these margins there.
        places: what is left out with each comparison, itself among them, padded.
        present: bool [G, n, g], False at padding.
        floats_per_part: numbers of the largest matrix held.
    """
    num_users, num, size = places.shape
    users = torch.arange(num_users, device=places.device).repeat_interleave(num)
    own = torch.arange(num, device=places.device).repeat(num_users)
    falls = []
    step = max(1, floats_per_part // size**2)
    for part in torch.arange(len(users), device=places.device).split(step):
        user, group = users[part], places.flatten(0, 1)[part]
        real = present.flatten(0, 1)[part].to(margins.dtype)
        gradient = torch.sigmoid(-margins[user[:, None], group]) * real
        covariance = covariances(user, group) * real[:, :, None] * real[:, None, :]
        curvature = torch.sigmoid(margins[user[:, None], group]) * gradient
        inner = torch.eye(size, dtype=margins.dtype, device=margins.device)
        inner = inner - curvature[:, :, None] * covariance
        # Of features that are no numbers it makes margins that are none, and no error.
        solved = torch.linalg.solve_ex(inner, gradient[..., None]).result
        is_own = (group == own[part][:, None]) * real
        falls.append(((covariance @ solved)[..., 0] * is_own).sum(1))
    return margins - torch.cat(falls).view(num_users, num)
