"""L2 logistic regression of many users at once, each from scratch: the baseline that a personal head must beat.

Minimised per user over w:  sum_i log(1 + exp(-<w, d_i>)) + strength / 2 |w|^2,  with d_i = the preferred response's
features less the other's, divided by the root mean square of their lengths over the user's own pairs, so that one list
of strengths serves features of any scale. No intercept: a comparison has no side of its own.

Newton's method (iteratively reweighted least squares) with a search along each step. With n pairs and H features it
runs in the dual where n <= H (Rasmussen and Williams 2006, algorithm 3.1), in the primal elsewhere; fp64 throughout.
Users lie along the first axis, padded to a size that depends on the user alone.

The strength of each user is that with the lowest log-loss when each of the user's own pairs is left out in turn, with
all that share a response with it, by one step from the whole fit (`left_out_pairs.py`); nothing else decides it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pal_ds.distributed import phase
from pal_ds.eval.left_out_pairs import Covariances, Sharing, left_out_margins
from pal_ds.heads.jaxtyping_fallback import Float, Int

STRENGTHS = (100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""From strong to weak: each fit begins where the one before ended, and of equals the strongest is chosen."""
MAX_STEPS = 30
TOLERANCE = 1e-9
"""A fit ends where a step gains less than this, in nats."""
STEP_SIZES = tuple(0.5**power for power in range(8))
FLOATS_PER_BATCH = 2**22
"""Numbers of the largest matrix of a batch of users: 32 MB, of which a fit holds a few copies."""


class OwnedPairs(NamedTuple):
    """Comparisons of users 0..num_users-1; a distinct pair of responses may be of several users."""

    differences: Float[Tensor, "m H"]
    """Features of the preferred response less those of the other, of each distinct pair."""
    responses: Int[np.ndarray, "m 2"]
    """Numbers of the two responses of each distinct pair, at least 0: equal where they are the same response."""
    pair: Int[np.ndarray, "n"]
    """Row of `differences` of each comparison."""
    owner: Int[np.ndarray, "n"]
    num_users: int


class Regressions(NamedTuple):
    """Fitted regressions; w of a user is the sum of coefficient times difference over the user's comparisons."""

    coefficients: Float[Tensor, "n"]
    """fp64, at least 0."""
    left_out: Float[Tensor, "n"]
    """Margin of each comparison by the regression on the user's others that share no response with it, approximately;
    fp64. 0 where there are none."""
    strength: Float[Tensor, "U"]
    """fp64; NaN for a user without comparisons."""


@torch.no_grad()
def fit_regressions(pairs: OwnedPairs, strengths: tuple[float, ...] = STRENGTHS) -> Regressions:
    """Fit the regression of every user of `pairs`, each with the strength that serves the user's left-out pairs best.

    `strengths` fall. Memory is bounded; features may be of any float dtype, on any device.
    """
    num_pairs, device = len(pairs.pair), pairs.differences.device
    coefficients = torch.zeros(num_pairs, dtype=torch.float64, device=device)
    left_out, chosen = (
        torch.zeros_like(coefficients),
        coefficients.new_full((pairs.num_users,), torch.nan),
    )
    sharing = Sharing.of(pairs.responses[pairs.pair], pairs.owner)
    for users, places, is_pair, size in _batches(pairs, sharing):
        phase.progress()
        rows = torch.from_numpy(pairs.pair[places]).to(device)
        present = torch.from_numpy(is_pair).to(device)
        features = pairs.differences[rows].double() * present[..., None]
        # Of equal responses there is nothing to learn, and nothing to divide by.
        square = features.square().sum((1, 2)) / present.sum(1)
        square = torch.where(square > 0, square, 1.0)
        shared = [
            torch.from_numpy(part).to(device) for part in sharing.within(places, is_pair, size)
        ]
        fit = _best_fit(features / square.sqrt()[:, None, None], present, shared, strengths)
        where = torch.from_numpy(places[is_pair]).to(device)
        per_unit = fit.gradient / (fit.strength * square)[:, None]
        coefficients[where], left_out[where] = per_unit[present], fit.left_out[present]
        chosen[torch.from_numpy(users).to(device)] = fit.strength
    return Regressions(coefficients, left_out, chosen)


def weights_of(
    pairs: OwnedPairs, fitted: Regressions
) -> Iterator[tuple[int, Float[Tensor, "u H"]]]:
    """Yield (first user, w of this user and those that follow), fp32, as many at once as memory is meant for."""
    width = pairs.differences.shape[1]
    order = np.argsort(pairs.owner, kind="stable")
    first = np.searchsorted(pairs.owner[order], np.arange(pairs.num_users + 1))
    step = max(1, FLOATS_PER_BATCH // width)
    for begin in range(0, pairs.num_users, step):
        end = min(begin + step, pairs.num_users)
        weights = pairs.differences.new_zeros((end - begin, width), dtype=torch.float32)
        mine = order[first[begin] : first[end]]
        for part in np.array_split(mine, max(1, -(-len(mine) * width // FLOATS_PER_BATCH))):
            rows = torch.from_numpy(pairs.pair[part])
            scaled = (
                fitted.coefficients[torch.from_numpy(part)].float()[:, None]
                * pairs.differences[rows].float()
            )
            weights.index_add_(0, torch.from_numpy(pairs.owner[part] - begin), scaled)
        yield begin, weights


def _batches(
    pairs: OwnedPairs, sharing: Sharing
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, int]]:
    """Yield users with comparisons [G], the places of these, padded [G, n], which are no padding [G, n], and g.

    g is the most comparisons that are left out with one of them, padded.
    """
    order = np.argsort(pairs.owner, kind="stable")
    counts = np.bincount(pairs.owner, minlength=pairs.num_users)
    first = np.cumsum(counts) - counts
    width = pairs.differences.shape[1]
    most = np.zeros(pairs.num_users, np.int64)
    np.maximum.at(most, pairs.owner, sharing.counts)
    sizes = np.asarray([[_padded(one) for one in each.tolist()] for each in (counts, most)]).T
    for size, shared in np.unique(sizes[counts > 0], axis=0).tolist():
        users = np.flatnonzero((sizes == (size, shared)).all(1) & (counts > 0))
        group = max(1, FLOATS_PER_BATCH // (size * max(width, min(size, width), shared)))
        for part in np.split(users, range(group, len(users), group)):
            is_pair = np.arange(size) < counts[part][:, None]
            places = order[np.minimum(first[part][:, None] + np.arange(size), len(order) - 1)]
            yield part, places, is_pair, shared


def _padded(count: int) -> int:
    """The size to which a user's comparisons are padded: a power of two, or one and a half of it."""
    power = 1 << max(count - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and count <= power * 3 // 4 else power


class _Fit(NamedTuple):
    """A batch of users at one strength each."""

    gradient: Float[Tensor, "G n"]
    """Of the log-likelihood in each margin, sigmoid(-margin)."""
    left_out: Float[Tensor, "G n"]
    loss: Float[Tensor, "G"]
    """Mean log-loss of left-out comparisons."""
    strength: Float[Tensor, "G"]


def _best_fit(
    features: Float[Tensor, "G n H"],
    present: Tensor,
    shared: list[Tensor],
    strengths: tuple[float, ...],
) -> _Fit:
    """The fit of each user at the strength of the lowest left-out loss."""
    best: _Fit | None = None
    num_pairs, width = features.shape[1:]
    gram = features @ features.mT if num_pairs <= width else None
    margins = features.new_zeros(features.shape[:2])
    for strength in strengths:
        step = _Primal(features, strength) if gram is None else _Dual(gram / strength)
        margins = _minimise(step, margins)
        gradient = torch.sigmoid(-margins)
        covariances = step.covariances(gradient * (1 - gradient))
        left_out = present * left_out_margins(
            margins, covariances, shared[0], shared[1], floats_per_part=FLOATS_PER_BATCH
        )
        losses = torch.nn.functional.softplus(-left_out) * present
        fit = _Fit(
            gradient,
            left_out,
            losses.sum(1) / present.sum(1),
            margins.new_full((len(margins),), strength),
        )
        # Where all pairs are left out with one, nothing is left: all strengths are equal but for rounding.
        better = None if best is None else fit.loss < best.loss - 1e-9
        best = fit if best is None or better is None else _chosen(better, fit, best)
    assert best is not None, "there is at least one strength"
    return best


def _chosen(better: Tensor, fit: _Fit, best: _Fit) -> _Fit:
    parts = zip(fit, best, strict=True)
    return _Fit(
        *(torch.where(better[:, None] if new.ndim == 2 else better, new, old) for new, old in parts)
    )


class _Dual:
    """Newton's steps in the margins' own space, n x n: the margins are `kernel` times the parameters."""

    def __init__(self, kernel: Float[Tensor, "G n n"]) -> None:
        self._kernel = kernel

    def towards(
        self, margins: Tensor, gradient: Tensor, curvature: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Parameters and margins [G, n] at which the step ends."""
        root, target = curvature.sqrt(), curvature * margins + gradient
        inner = root * (self._kernel @ target[..., None])[..., 0]
        solved = torch.cholesky_solve(inner[..., None], self._factor(root))[..., 0]
        parameters = target - root * solved
        return parameters, (self._kernel @ parameters[..., None])[..., 0]

    def penalty(self, parameters: Tensor, margins: Tensor) -> Tensor:
        return 0.5 * (parameters * margins).sum(-1)

    def begin(self, margins: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters at the gradient of given margins, and the margins that they make."""
        parameters = torch.sigmoid(-margins)
        return parameters, (self._kernel @ parameters[..., None])[..., 0]

    def covariances(self, curvature: Tensor) -> Covariances:
        root = curvature.sqrt()
        solved = torch.linalg.solve_triangular(
            self._factor(root), root[..., None] * self._kernel, upper=False
        )
        whole = self._kernel - solved.mT @ solved
        return lambda users, places: whole[
            users[:, None, None], places[:, :, None], places[:, None, :]
        ]

    def _factor(self, root: Tensor) -> Tensor:
        inner = root[:, :, None] * self._kernel * root[:, None, :]
        inner.diagonal(dim1=1, dim2=2).add_(1)
        # Of features that are no numbers it makes margins that are none, and no error.
        return torch.linalg.cholesky_ex(inner).L


class _Primal:
    """Newton's steps in the weights, H x H: parameters are the weights times the root of the strength."""

    def __init__(self, features: Float[Tensor, "G n H"], strength: float) -> None:
        self._features = features / strength**0.5

    def towards(
        self, margins: Tensor, gradient: Tensor, curvature: Tensor
    ) -> tuple[Tensor, Tensor]:
        target = self._features.mT @ (curvature * margins + gradient)[..., None]
        parameters = torch.cholesky_solve(target, self._factor(curvature))[..., 0]
        return parameters, (self._features @ parameters[..., None])[..., 0]

    def penalty(self, parameters: Tensor, margins: Tensor) -> Tensor:
        return 0.5 * parameters.square().sum(-1)

    def begin(self, margins: Tensor) -> tuple[Tensor, Tensor]:
        parameters = (self._features.mT @ torch.sigmoid(-margins)[..., None])[..., 0]
        return parameters, (self._features @ parameters[..., None])[..., 0]

    def covariances(self, curvature: Tensor) -> Covariances:
        factor = self._factor(curvature)
        solved = torch.linalg.solve_triangular(factor, self._features.mT, upper=False).mT

        def of(users: Tensor, places: Tensor) -> Tensor:
            chosen = solved[users[:, None], places]
            return chosen @ chosen.mT

        return of

    def _factor(self, curvature: Tensor) -> Tensor:
        inner = self._features.mT @ (curvature[..., None] * self._features)
        inner.diagonal(dim1=1, dim2=2).add_(1)
        # Of features that are no numbers it makes margins that are none, and no error.
        return torch.linalg.cholesky_ex(inner).L


def _minimise(step: _Dual | _Primal, margins: Float[Tensor, "G n"]) -> Float[Tensor, "G n"]:
    """Margins at the minimum, sought from those of a fit nearby; the objective is convex, and any start will do."""
    parameters, margins = step.begin(margins)
    sizes = margins.new_tensor(STEP_SIZES)[:, None, None]
    value = _objective(step, parameters, margins)
    for _ in range(MAX_STEPS):
        gradient = torch.sigmoid(-margins)
        goal, goal_margins = step.towards(margins, gradient, gradient * (1 - gradient))
        trials = torch.lerp(parameters, goal, sizes), torch.lerp(margins, goal_margins, sizes)
        values = _objective(step, trials[0], trials[1])
        lowest, place = values.min(0)
        gain = value - lowest
        place = place[None, :, None]
        better = (gain > 0)[:, None]
        parameters, margins = (
            torch.where(better, trial.take_along_dim(place, 0)[0], now)
            for trial, now in zip(trials, (parameters, margins), strict=True)
        )
        value = torch.minimum(value, lowest)
        if not bool((gain > TOLERANCE).any()):
            break
    return margins


def _objective(
    step: _Dual | _Primal, parameters: Float[Tensor, "*T G p"], margins: Float[Tensor, "*T G n"]
) -> Float[Tensor, "*T G"]:
    return torch.nn.functional.softplus(-margins).sum(-1) + step.penalty(parameters, margins)
