"""Diagnostics of a trained head's prototypes and users: collapse shows here before accuracy does."""

from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pal_ds.eval.schema import LatentDiagnostics, PrototypeDiagnostics
from pal_ds.heads.base import Head, UserState
from pal_ds.heads.jaxtyping_fallback import Float


def diagnose(head: Head, mixtures: Float[Tensor, "U K"]) -> PrototypeDiagnostics:
    """The "diagnostics" of `eval/NAME.json` from the mixtures s_u of a run's own users.

    Entropies are in nats, at most log K. `effective_prototypes` is exp H(mean of s_u), how many are in use;
    `effective_prototypes_per_user` the mean of exp H(s_u), how many a user mixes. Where a head has a point for a user
    (`Head.locate`), prototype k is the point of the user who is all k; of these points come the matrix of Euclidean
    distances and, between two different ones, the least and mean distance and the largest cosine. Null elsewhere, and
    for fewer than two prototypes or no users.
    """
    num_users, num_prototypes = mixtures.shape
    # Of millions of users: summed in fp64, but never copied to it.
    weights = mixtures.float().cpu()
    shares = weights.mean(0, dtype=torch.float64)
    entropies = _entropy(weights)
    known = num_users > 0
    per_user = float(entropies.exp().mean(dtype=torch.float64)) if known else None
    diagnostics = {
        "users": num_users,
        "prototypes": num_prototypes,
        "user_entropy_mean": float(entropies.mean(dtype=torch.float64)) if known else None,
        "effective_prototypes": float(_entropy(shares).exp()) if known else None,
        "effective_prototypes_per_user": per_user,
        "prototype_shares": shares.tolist() if known else None,
        **_distances(_prototypes(head, num_prototypes)),
    }
    return cast(PrototypeDiagnostics, diagnostics)


ACTIVE_VARIANCE = 1e-2
"""A latent unit is in use where its mean varies by more than this over users (Burda et al. 2016, arXiv 1509.00519)."""


def diagnose_latent(points: Float[Tensor, "U K"]) -> LatentDiagnostics:
    """The "diagnostics" of a head that makes points from comparisons: which of its K latent units say anything.

    `active_units` is the share of units in use; null for fewer than two users.
    """
    num_users, num_units = points.shape
    variance = points.double().cpu().var(0, correction=0)
    active = float((variance > ACTIVE_VARIANCE).double().mean()) if num_users > 1 else None
    return {"users": num_users, "latent_units": num_units, "active_units": active}


def context_flip(
    margins: np.ndarray, turned: np.ndarray, known: np.ndarray, disputed: np.ndarray
) -> dict[str, float | None]:
    """Share of the pairs of known users that are judged the other way when the users' own comparisons are.

    {"all", "controversial"}: a model that knows whom it serves turns around where users disagree, and need not
    elsewhere; null without such pairs.
    """
    flipped = np.sign(margins) == -np.sign(turned)
    chosen = {"all": known, "controversial": known & disputed}
    return {
        name: float(flipped[rows].mean()) if rows.any() else None for name, rows in chosen.items()
    }


def _entropy(weights: Float[Tensor, "*n K"]) -> Float[Tensor, "*n"]:
    """-sum_k s_k log s_k, with 0 log 0 = 0."""
    return -torch.special.xlogy(weights, weights).sum(-1)


def _prototypes(head: Head, num_prototypes: int) -> Float[Tensor, "K d"] | None:
    corners = torch.eye(num_prototypes, device=next(head.parameters()).device)
    with torch.no_grad():
        points = head.eval().locate(UserState(mixture=corners))
    return None if points is None else points.double().cpu()


def _distances(points: Float[Tensor, "K d"] | None) -> dict[str, Any]:
    if points is None or len(points) < 2:
        return dict.fromkeys(("prototype_distances", "distance_min", "distance_mean", "cosine_max"))
    distances = torch.linalg.vector_norm(points[:, None] - points, dim=-1)
    unit = torch.nn.functional.normalize(points, dim=-1)
    first, second = torch.triu_indices(len(points), len(points), offset=1)
    return {
        "prototype_distances": distances.tolist(),
        "distance_min": float(distances[first, second].min()),
        "distance_mean": float(distances[first, second].mean()),
        "cosine_max": float((unit @ unit.T)[first, second].max()),
    }
