"""Ties in an evaluation: how well the probability of all three outcomes is known."""

from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar

from pal_ds.eval.schema import TieFigures
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.tie_models import TieModel, tie_loss, win_loss


class ThreeWay(NamedTuple):
    """A model of ties with its threshold."""

    model: TieModel
    threshold: float
    learnt: bool
    """False where the threshold was fitted on dev after training."""


def three_way_losses(
    margins: Float[np.ndarray, "n"],
    labels: Float[np.ndarray, "n"],
    three_way: ThreeWay,
    *,
    shares: Float[np.ndarray, "n"] | None = None,
    log_factor: Float[np.ndarray, "n"] | None = None,
) -> Float[np.ndarray, "n"]:
    """-log of the probability of what each user said, fp64.

    Args:
        margins: log-odds that response_2 is preferred.
        labels: -1, 0 (a tie) or +1.
        three_way: model of ties.
        shares: share of the preference that response_2 has (`tables.targets`), for soft labels: the loss of these is
            the mean of both responses' by their shares, as in training. Unset: every label is sure.
        log_factor: its exponential multiplies the threshold of each pair's user. Unset: all have the run's.
    """
    shares = (labels + 1) / 2 if shares is None else np.asarray(shares, np.float64)
    lead, model = torch.from_numpy(margins).double(), three_way.model
    threshold = torch.full_like(lead, three_way.threshold)
    if log_factor is not None:
        threshold = threshold * torch.from_numpy(log_factor).exp()
    up, down = (win_loss(side, threshold, model).numpy() for side in (lead, -lead))
    # A margin that is infinite makes one of the two infinite, and a sure label does not look at it.
    of_second, of_first = (
        np.where(share > 0, share, 0.0) * np.where(share > 0, loss, 0.0)
        for share, loss in ((shares, up), (1 - shares, down))
    )
    return np.where(labels == 0, tie_loss(lead, threshold, model).numpy(), of_second + of_first)


def fit_threshold(
    margins: Float[np.ndarray, "n"],
    labels: Float[np.ndarray, "n"],
    model: TieModel = "davidson",
    *,
    shares: Float[np.ndarray, "n"] | None = None,
) -> ThreeWay | None:
    """The threshold under which these labels are likeliest; None where there is no tie, or nothing but ties.

    Arguments as in `three_way_losses`; margins that are no finite numbers are left out.
    """
    finite = np.isfinite(margins)
    margins, labels = margins[finite], labels[finite]
    shares = None if shares is None else shares[finite]
    if not 0 < (labels == 0).sum() < len(labels):
        return None

    def cost(log_threshold: float) -> float:
        guess = ThreeWay(model, float(np.exp(log_threshold)), False)
        return float(three_way_losses(margins, labels, guess, shares=shares).mean())

    best = minimize_scalar(cost, bounds=(-7.0, 5.0), method="bounded")
    return ThreeWay(model, float(np.exp(best.x)), False)


def tie_figures(
    margins: Float[np.ndarray, "n"],
    labels: Float[np.ndarray, "n"],
    three_way: ThreeWay | None,
    *,
    shares: Float[np.ndarray, "n"] | None = None,
    log_factor: Float[np.ndarray, "n"] | None = None,
) -> TieFigures:
    """How many of these pairs are ties, and the mean of `three_way_losses`, whose arguments these are, over them.

    The threshold among the figures is the run's.
    """
    figures: TieFigures = {
        "pairs": len(labels),
        "ties": int((labels == 0).sum()),
        "log_loss": None,
        "model": None,
        "threshold": None,
        "learnt": None,
    }
    if three_way is None or len(labels) == 0:
        return figures
    loss = float(
        three_way_losses(margins, labels, three_way, shares=shares, log_factor=log_factor).mean()
    )
    of_model = {"model": three_way.model, "threshold": three_way.threshold}
    figures.update(
        log_loss=loss if np.isfinite(loss) else None, learnt=three_way.learnt, **of_model
    )
    return figures
