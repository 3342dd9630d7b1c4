"""How sure a fit is of each user: the posterior covariance of a user's point, from Laplace's Gaussian, reweighed.

Laplace's approximation alone is not honest here. With few comparisons the posterior is as wide as the prior, whose
density may have clusters, and between fitted numbers and the point lies a softmax that saturates: on planted worlds its
90% intervals of margins cover 98% at two comparisons. Its Gaussian is therefore a proposal: draws from it and from the
prior, then from the Gaussian of those, get the weight that the posterior gives them (importance sampling with the
mixture of all proposals as density, Owen and Zhou 2000; weights truncated, Ionides 2008).

The draws are one fixed quasi-random set for all users, so nobody who is fitted beside a user matters to them.
Axes: U users, M draws, K numbers of a point, D directions in which the fitted numbers move, C components of the prior.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pal_ds.adaptation.prior import LogitPrior
from pal_ds.heads.jaxtyping_fallback import Float

NUM_DRAWS = 64
"""Draws from each of the two rounds of proposals; powers of 2 suit Sobol's sequence."""
INFLATION = 1.5
"""Factor of the second proposal's covariance: a proposal should be wider than its target."""
FLOATS_AT_ONCE = 2**22
"""Draws of users that are in memory at once, as numbers: 16 MB, of which a few copies are held."""


class Coordinates(Protocol):
    """The way from the numbers that are fitted for a user to the user's point."""

    def directions(self, width: int) -> Float[Tensor, "K D"]:
        """Orthonormal directions in which the fitted numbers, `width` of them, move; all others change no point."""
        ...

    def point(self, fitted: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        """The point of each row of fitted numbers."""
        ...


class Simplex:
    """The coordinates of users whose point is softmax(w / tau): a shift of all logits changes nothing."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature

    def directions(self, width: int) -> Float[Tensor, "K D"]:
        centring = torch.eye(width, dtype=torch.float64) - 1 / width
        return torch.linalg.qr(centring[:, 1:]).Q.float()

    def point(self, fitted: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        return torch.softmax(fitted / self.temperature, -1)


class Likelihood(Protocol):
    """The comparisons of some users, as a function of the numbers that are fitted."""

    def log_value(
        self, fitted: Float[Tensor, "U M K"], point: Float[Tensor, "U M K"]
    ) -> Float[Tensor, "U M"]:
        """Log likelihood of each user's comparisons at M places, up to a constant of each user."""
        ...

    def curvature(self, fitted: Float[Tensor, "U K"]) -> Float[Tensor, "U K K"]:
        """Curvature of minus the log likelihood in the fitted numbers, at one place of each user."""
        ...


class Posterior(NamedTuple):
    """The posterior of users' points, about the points that were fitted."""

    covariance: Float[Tensor, "U K K"]
    """E[(s - s_fit)(s - s_fit)^T]: what the fitted point may be wrong by, its own bias included; fp32."""
    mean: Float[Tensor, "U K"]
    """E[s]."""
    effective_draws: Float[Tensor, "U"]
    """1 / sum of squared weights: out of 2 NUM_DRAWS, how many draws the moments stand on."""


@torch.no_grad()
def posterior_of(
    likelihood: Likelihood,
    fitted: Float[Tensor, "U K"],
    prior: LogitPrior,
    coordinates: Coordinates,
) -> Posterior:
    """The moments of some users' points under their comparisons and the prior.

    Args:
        likelihood: of these users' comparisons.
        fitted: the numbers that the solver ended with, fp32; for the simplex centred logits.
        prior: the density of fitted numbers before any comparison.
        coordinates: the way from fitted numbers to points.
    """
    num_users, width = fitted.shape
    basis = coordinates.directions(width).to(fitted.device)
    if basis.shape[1] == 0:
        none = fitted.new_zeros(num_users, width, width)
        return Posterior(none, coordinates.point(fitted), fitted.new_ones(num_users))
    density = _PriorDensity(prior, basis)
    curvature = basis.T @ likelihood.curvature(fitted) @ basis
    local = _laplace(curvature, fitted @ basis, density)
    draws = _normals(2 * NUM_DRAWS, basis.shape[1] + 1).to(fitted.device)
    half = NUM_DRAWS // 2
    common = density.draws(draws[:half])
    places = common.expand(num_users, -1, -1)
    places = torch.cat([places, local.draws(draws[half:NUM_DRAWS, 1:])], 1)
    target = _Target(likelihood, density, basis, coordinates)
    first = target.at(places)
    proposals = torch.logaddexp(first.log_prior, local.log_density(places))
    second = _of_moments(places, _weights(first.log_posterior - proposals), local)
    more = target.at(second.draws(draws[NUM_DRAWS:, 1:]))
    places, points, log_posterior, log_prior = (
        torch.cat(part, 1) for part in zip(first, more, strict=True)
    )
    # In the shares in which they were drawn from: a quarter, a quarter and a half.
    proposals = torch.logaddexp(log_prior, local.log_density(places))
    proposals = torch.logaddexp(proposals, second.log_density(places) + math.log(2))
    weight = _weights(log_posterior - proposals)
    away = points - coordinates.point(fitted)[:, None]
    covariance = (weight.unsqueeze(-1) * away).mT @ away
    mean = (weight.unsqueeze(-1) * points).sum(1)
    return Posterior(covariance, mean, 1 / weight.square().sum(1))


class _Places(NamedTuple):
    """Draws, with what is known there."""

    places: Float[Tensor, "U M D"]
    points: Float[Tensor, "U M K"]
    log_posterior: Float[Tensor, "U M"]
    log_prior: Float[Tensor, "U M"]


class _Target(NamedTuple):
    """The posterior in D coordinates."""

    likelihood: Likelihood
    density: "_PriorDensity"
    basis: Float[Tensor, "K D"]
    coordinates: Coordinates

    def at(self, places: Float[Tensor, "U M D"]) -> _Places:
        fitted = places @ self.basis.T
        points, log_prior = self.coordinates.point(fitted), self.density.log_density(places)
        return _Places(
            places, points, self.likelihood.log_value(fitted, points) + log_prior, log_prior
        )


def _weights(log_ratio: Float[Tensor, "U M"]) -> Float[Tensor, "U M"]:
    """Weights of draws that sum to 1, none above sqrt(M) times their mean; those of no number are 0."""
    log_ratio = log_ratio.nan_to_num(nan=-torch.inf)
    # Of a user whose comparisons are no numbers, all draws count alike.
    log_ratio = torch.where(log_ratio.isfinite().any(1, keepdim=True), log_ratio, 0.0)
    weight = torch.softmax(log_ratio, 1)
    weight = weight.clamp(max=weight.shape[1] ** -0.5)
    return weight / weight.sum(1, keepdim=True)


class _Gaussian(NamedTuple):
    """A Gaussian of each user."""

    mean: Float[Tensor, "U D"]
    root: Float[Tensor, "U D D"]
    """A with x = mean + A z for standard normal z."""
    whiten: Float[Tensor, "U D D"]
    """The inverse of A."""
    log_volume: Float[Tensor, "U"]
    """log |det A|."""

    def draws(self, normals: Float[Tensor, "M D"]) -> Float[Tensor, "U M D"]:
        return self.mean[:, None] + normals @ self.root.mT

    def log_density(self, places: Float[Tensor, "U M D"]) -> Float[Tensor, "U M"]:
        """Up to the constant of all Gaussians of D coordinates."""
        white = (places - self.mean[:, None]) @ self.whiten.mT
        return -0.5 * white.square().sum(-1) - self.log_volume[:, None]


class _PriorDensity:
    """The prior in D coordinates, as a density that can be drawn from."""

    def __init__(self, prior: LogitPrior, basis: Float[Tensor, "K D"]) -> None:
        precisions = basis.T @ prior.precisions @ basis
        lower = torch.linalg.cholesky(precisions)
        self.lower = lower[0]
        """Cholesky factor of everybody's precision."""
        component = torch.arange(prior.num_components, device=basis.device).clamp(max=1)
        roots = torch.linalg.inv(lower).mT
        log_volume = -lower.diagonal(dim1=1, dim2=2).log().sum(1)
        self.components = _Gaussian(
            prior.means @ basis, roots[component], lower.mT[component], log_volume[component]
        )
        self.log_weights = torch.log_softmax(prior.heights + self.components.log_volume, 0)

    def draws(self, normals: Float[Tensor, "M 1+D"]) -> Float[Tensor, "M D"]:
        """The first number of each row draws the component."""
        level = torch.special.ndtr(normals[:, 0].contiguous())
        ends = self.log_weights.exp().cumsum(0)
        chosen = torch.searchsorted(ends, level).clamp(max=len(ends) - 1)
        return self.components.mean[chosen] + torch.einsum(
            "mde,me->md", self.components.root[chosen], normals[:, 1:]
        )

    def log_density(self, places: Float[Tensor, "U M D"]) -> Float[Tensor, "U M"]:
        """Up to the constant of all Gaussians of D coordinates."""
        each = self.components
        heights = self.log_weights - each.log_volume
        everybody = heights[0] - 0.5 * ((places - each.mean[0]) @ each.whiten[0].T).square().sum(-1)
        if len(heights) == 1:
            return everybody
        # Clusters share a precision: squares are expanded around everybody's mean.
        white = (places - each.mean[0]) @ each.whiten[1].T
        centres = (each.mean[1:] - each.mean[0]) @ each.whiten[1].T
        squares = white.square().sum(-1, keepdim=True) + centres.square().sum(-1)
        clusters = heights[1:] + white @ centres.T - 0.5 * squares
        return torch.logaddexp(everybody, clusters.logsumexp(-1))


def _laplace(
    curvature: Float[Tensor, "U D D"], mean: Float[Tensor, "U D"], density: _PriorDensity
) -> _Gaussian:
    """Laplace's Gaussian at the fit, in coordinates where everybody's prior is the unit ball.

    Comparisons never make it wider than the prior: where a softmax saturates the objective bends down.
    """
    lower = density.lower
    inverse = torch.linalg.inv(lower)
    values, vectors = torch.linalg.eigh((inverse @ curvature @ inverse.T).nan_to_num())
    scale = (1 + values.clamp(min=0)).sqrt()
    root = inverse.T @ (vectors / scale[:, None])
    whiten = scale[:, :, None] * (vectors.mT @ lower.T)
    log_volume = -lower.diagonal().log().sum() - scale.log().sum(1)
    return _Gaussian(mean, root, whiten, log_volume)


def _of_moments(
    places: Float[Tensor, "U M D"], weight: Float[Tensor, "U M"], local: _Gaussian
) -> _Gaussian:
    """The Gaussian of weighted draws, wider by INFLATION, and never without the width of `local`."""
    mean = (weight.unsqueeze(-1) * places).sum(1)
    away = places - mean[:, None]
    covariance = INFLATION * (weight.unsqueeze(-1) * away).mT @ away
    root = torch.linalg.cholesky(covariance + 0.1 * local.root @ local.root.mT)
    identity = torch.eye(places.shape[-1], device=places.device).expand_as(root)
    whiten = torch.linalg.solve_triangular(root, identity, upper=False)
    return _Gaussian(mean, root, whiten, root.diagonal(dim1=1, dim2=2).log().sum(1))


def _normals(count: int, width: int) -> Float[Tensor, "M D"]:
    """Standard normal numbers, equal at each call: Sobol's sequence, scrambled, through the normal's quantiles."""
    engine = torch.quasirandom.SobolEngine(width, scramble=True, seed=0)
    level = engine.draw(count, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    return torch.special.ndtri(level).float()


def users_at_once(num_terms: int, width: int) -> int:
    """Users whose draws fill about FLOATS_AT_ONCE, with `num_terms` scored positions each."""
    return max(1, FLOATS_AT_ONCE // (2 * NUM_DRAWS * (num_terms + width * width)))
