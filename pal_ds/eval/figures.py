"""Figures of an evaluation from gathered margins, for users that the run knows and for strangers."""

from typing import NamedTuple

import numpy as np

from pal_ds.data.tables import PreparedData
from pal_ds.eval.baselines import FormatBaseline, length_margins
from pal_ds.eval.disagreement import controversial
from pal_ds.eval.metrics import LabelledPairs, evaluation_figures, fit_temperature
from pal_ds.eval.schema import PairFigures, SplitFigures


def figures_of(
    data: PreparedData,
    rows: np.ndarray,
    margins: np.ndarray,
    temperature: float = 1.0,
    format_baseline: FormatBaseline | None = None,
) -> PairFigures:
    """Compute the figures of `eval/NAME.json`; `format_baseline` was counted on the training data."""
    table = data.comparisons[rows]
    owners, owner = np.unique(table["user"], return_inverse=True)
    names = np.asarray([data.users[owner] for owner in owners], str)
    pairs = LabelledPairs(
        labels=table["label"].astype(float),
        user_ids=names[owner],
        prompts=data.response_prompt[table["a"]],
        probabilities=table["probability"].astype(float),
        controversial=controversial(table),
    )
    return evaluation_figures(
        margins,
        pairs,
        temperature=temperature,
        length_margins=length_margins(data, table),
        format_margins=None if format_baseline is None else format_baseline.margins(data, table),
    )


class ScoredRows(NamedTuple):
    """Comparisons of prepared data with the margins that a run gives them."""

    data: PreparedData
    rows: np.ndarray
    """Rows of the comparisons table; int64 [n]."""
    margins: np.ndarray
    """> 0 prefers response_2; fp64 [n]."""
    table_rows: np.ndarray
    """Row of each comparison's user in the user table, -1 for strangers; int64 [n]."""


def report_on(
    scored: ScoredRows, temperature: float = 1.0, format_baseline: FormatBaseline | None = None
) -> SplitFigures:
    """Compute figures over the users that the table holds; those of strangers are under "unknown_users"."""
    data, rows, margins, table_rows = scored
    known = table_rows >= 0
    figures = figures_of(data, rows[known], margins[known], temperature, format_baseline)
    unknown = figures_of(data, rows[~known], margins[~known], temperature, format_baseline)
    return {**figures, "unknown_users": unknown}


def dev_temperature(margins: np.ndarray, labels: np.ndarray, loss_kind: str) -> float:
    """1 under the logistic loss, whose margins are log-odds; else fitted on these held-out pairs."""
    if loss_kind == "logistic" or len(margins) == 0:
        return 1.0
    return fit_temperature(margins, labels)


__all__ = [
    "ScoredRows",
    "dev_temperature",
    "figures_of",
    "report_on",
]
