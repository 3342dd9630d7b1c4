"""What an evaluation says: whose mixtures are asked for, and the figures that gathered margins give."""

from typing import Any

import numpy as np

from pal_ds.data.tables import PreparedData
from pal_ds.eval.baselines import FormatBaseline, length_margins
from pal_ds.eval.disagreement import controversial
from pal_ds.eval.metrics import evaluation_figures, fit_temperature
from pal_ds.inference.mixtures import population_mixture, user_mixtures, with_mixtures


def figures_of(
    data: PreparedData,
    rows: np.ndarray,
    margins: np.ndarray,
    temperature: float = 1.0,
    looks: FormatBaseline | None = None,
) -> dict[str, Any]:
    """The figures of `eval/NAME.json` for comparisons of prepared data; `looks` as counted on the training data."""
    table = data.comparisons[rows]
    owners, owner = np.unique(table["user"], return_inverse=True)
    names = np.asarray([data.users[owner] for owner in owners], str)
    return evaluation_figures(
        margins,
        table["label"].astype(float),
        names[owner],
        data.response_prompt[table["a"]],
        temperature=temperature,
        length_margins=length_margins(data, table),
        format_margins=None if looks is None else looks.margins(data, table),
        probabilities=table["probability"].astype(float),
        controversial=controversial(table),
    )


def report_on(
    data: PreparedData,
    rows: np.ndarray,
    margins: np.ndarray,
    table_rows: np.ndarray,
    temperature: float = 1.0,
    looks: FormatBaseline | None = None,
) -> dict[str, Any]:
    """Figures over the users the table holds, with those it does not apart under "unknown_users"."""
    known = table_rows >= 0
    figures = figures_of(data, rows[known], margins[known], temperature, looks)
    unknown = figures_of(data, rows[~known], margins[~known], temperature, looks)
    return {**figures, "unknown_users": unknown}


def dev_temperature(margins: np.ndarray, labels: np.ndarray, loss_kind: str) -> float:
    """1 under the logistic loss, whose margins are log-odds; else fitted on these held-out pairs."""
    if loss_kind == "logistic" or len(margins) == 0:
        return 1.0
    return fit_temperature(margins, labels)


__all__ = [
    "dev_temperature",
    "figures_of",
    "population_mixture",
    "report_on",
    "user_mixtures",
    "with_mixtures",
]
