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
    margins: Float[np.ndarray, "n"], labels: Float[np.ndarray, "n"], three_way: ThreeWay
) -> Float[np.ndarray, "n"]:
    """-log of the probability of what each user said; margins in log-odds, label -1, 0 (a tie) or +1; fp64."""
    lead = torch.from_numpy(np.where(labels == 0, margins, margins * labels))
    model, threshold = three_way.model, three_way.threshold
    of_tie, of_win = tie_loss(lead, threshold, model), win_loss(lead, threshold, model)
    return np.where(labels == 0, of_tie.numpy(), of_win.numpy())


def fit_threshold(
    margins: Float[np.ndarray, "n"],
    labels: Float[np.ndarray, "n"],
    model: TieModel = "davidson",
) -> ThreeWay | None:
    """The threshold under which these labels are likeliest; None where there is no tie, or nothing but ties."""
    finite = np.isfinite(margins)
    margins, labels = margins[finite], labels[finite]
    if not 0 < (labels == 0).sum() < len(labels):
        return None

    def cost(log_threshold: float) -> float:
        guess = ThreeWay(model, float(np.exp(log_threshold)), False)
        return float(three_way_losses(margins, labels, guess).mean())

    best = minimize_scalar(cost, bounds=(-7.0, 5.0), method="bounded")
    return ThreeWay(model, float(np.exp(best.x)), False)


def tie_figures(
    margins: Float[np.ndarray, "n"], labels: Float[np.ndarray, "n"], three_way: ThreeWay | None
) -> TieFigures:
    """How many of these pairs are ties, and the mean loss of all of them under a model of ties."""
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
    loss = float(three_way_losses(margins, labels, three_way).mean())
    of_model = {"model": three_way.model, "threshold": three_way.threshold}
    figures.update(
        log_loss=loss if np.isfinite(loss) else None, learnt=three_way.learnt, **of_model
    )
    return figures
