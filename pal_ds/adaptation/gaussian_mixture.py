"""Gaussian mixtures with one covariance for all components, fitted by EM; how many components, BIC says.

Axes: n points, M components, D coordinates. fp64; seeds are points far from each other, and the points that are looked
at follow from how many there are, so the same points always have the same clusters.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pal_ds.heads.jaxtyping_fallback import Float, Int

MAX_COMPONENTS = 16
POINTS_PER_COMPONENT = 4
"""Fewer points have fewer components."""
MAX_POINTS = 1024
"""Number of points looked at where there are more."""
MAX_STEPS = 100
TOLERANCE = 1e-6
PATIENCE = 3
"""The search ends where so many numbers of components in a row are no better than the best."""
LEAST_GAIN = 5.0
"""Nats by which clusters must beat a single Gaussian: "very strong" evidence (Kass and Raftery 1995, 2 log B > 10).

Of a few points of one Gaussian some partition or other is always a little better: of 8, in one draw out of three.
"""
VARIANCE_FLOOR = 0.1
SMALLEST_VARIANCE = 1e-3


class Clusters(NamedTuple):
    """sum_m weight_m N(mean_m, covariance)."""

    weight: Float[Tensor, "M"]
    mean: Float[Tensor, "M D"]
    covariance: Float[Tensor, "D D"]
    log_likelihood: float


def shrunk(covariance: Float[Tensor, "D D"], num_points: int) -> Float[Tensor, "D D"]:
    """Shrunk to its mean variance, since there may be fewer points than coordinates, and never singular."""
    width = len(covariance)
    identity = torch.eye(width, dtype=covariance.dtype)
    isotropic = covariance.diagonal().mean().clamp(min=VARIANCE_FLOOR) * identity
    weight = num_points / (num_points + 4.0 * width)
    return weight * covariance + (1 - weight) * isotropic + SMALLEST_VARIANCE * identity


def find_clusters(points: Float[Tensor, "n D"]) -> Clusters | None:
    """The mixture that the Bayesian information criterion prefers; None where a single Gaussian is about as good."""
    if points.numel() == 0:
        return None
    points = points[_looked_at(len(points))]
    single, best, best_clusters, worse = math.inf, math.inf, None, 0
    for count in range(1, min(MAX_COMPONENTS, len(points) // POINTS_PER_COMPONENT) + 1):
        clusters = _fit(points, count)
        num_parameters = count * points.shape[1] + count - 1
        score = 0.5 * num_parameters * math.log(len(points)) - clusters.log_likelihood
        single = score if count == 1 else single
        if score < best:
            best, best_clusters, worse = score, clusters, 0
        else:
            worse += 1
        if worse == PATIENCE:
            break
    return best_clusters if single - best > LEAST_GAIN else None


def _looked_at(num_points: int) -> Int[Tensor, "n"]:
    """MAX_POINTS of them, one of each run of neighbours; all where there are no more.

    One at random: users may come in a fixed turn of groups, and every eighth of them be of the same.
    """
    if num_points <= MAX_POINTS:
        return torch.arange(num_points)
    draw = torch.Generator().manual_seed(0)
    within = torch.rand(MAX_POINTS, generator=draw, dtype=torch.float64)
    return ((torch.arange(MAX_POINTS) + within) * (num_points / MAX_POINTS)).long()


def _fit(points: Float[Tensor, "n D"], count: int) -> Clusters:
    """EM (Dempster, Laird and Rubin 1977) from seeds that are far apart."""
    share = _nearest(points, _far_apart(points, count))
    last = -math.inf
    clusters = _maximise(points, share)
    for step in range(MAX_STEPS):
        log_density = _log_density(points, clusters)
        total = float(log_density.logsumexp(1).sum())
        clusters = clusters._replace(log_likelihood=total)
        if total - last < TOLERANCE * abs(total) or step + 1 == MAX_STEPS:
            break
        last = total
        clusters = _maximise(points, torch.softmax(log_density, 1))
    return clusters


def _maximise(points: Float[Tensor, "n D"], share: Float[Tensor, "n M"]) -> Clusters:
    total = share.sum(0).clamp(min=1e-9)
    mean = (share.T @ points) / total[:, None]
    # sum over points and components of share (x - mean)(x - mean)^T.
    covariance = (points.T @ points - (mean * total[:, None]).T @ mean) / len(points)
    return Clusters(total / len(points), mean, shrunk(covariance, len(points)), -math.inf)


def _log_density(points: Float[Tensor, "n D"], clusters: Clusters) -> Float[Tensor, "n M"]:
    """log weight_m + log N(point; mean_m, covariance)."""
    root = torch.linalg.cholesky(clusters.covariance)
    white, centres = (
        torch.linalg.solve_triangular(root, part.T, upper=False).T
        for part in (points, clusters.mean)
    )
    width = points.shape[1]
    constant = root.diagonal().log().sum() + 0.5 * width * math.log(2 * math.pi)
    return clusters.weight.log() - 0.5 * torch.cdist(white, centres).square() - constant


def _far_apart(points: Float[Tensor, "n D"], count: int) -> Float[Tensor, "M D"]:
    """The point farthest from the mean, then each time the one farthest from all that are chosen (Gonzalez 1985)."""
    distance = (points - points.mean(0)).square().sum(1)
    chosen: list[int] = []
    for _ in range(count):
        chosen.append(int(distance.argmax()))
        from_last = (points - points[chosen[-1]]).square().sum(1)
        distance = from_last if len(chosen) == 1 else torch.minimum(distance, from_last)
    return points[chosen]


def _nearest(points: Float[Tensor, "n D"], centres: Float[Tensor, "M D"]) -> Float[Tensor, "n M"]:
    """1 for the nearest centre of each point, after a few rounds of k-means."""
    share = points.new_zeros(len(points), len(centres))
    for _ in range(20):
        nearest = torch.cdist(points, centres).argmin(1)
        share = torch.nn.functional.one_hot(nearest, len(centres)).to(points.dtype)
        centres = (share.T @ points) / share.sum(0).clamp(min=1e-9)[:, None]
    return share
