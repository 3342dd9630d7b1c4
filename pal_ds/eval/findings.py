"""Findings of an evaluation beside its figures: diagnostics of the head, accuracy in training, warnings."""

import numpy as np

from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.eval.baselines import FormatBaseline, length_margins
from pal_ds.eval.diagnostics import diagnose, diagnose_latent
from pal_ds.eval.figures import ScoredRows
from pal_ds.eval.metrics import correctness
from pal_ds.eval.sanity_checks import (
    ScoredPairs,
    both_nearly_perfect,
    no_better_than_surface,
    training_accuracy,
    unseen_above_seen,
)
from pal_ds.eval.schema import Findings
from pal_ds.inference.load_run import OpenRun
from pal_ds.inference.readers import KnownUsers


def findings(
    restored: OpenRun,
    users: KnownUsers,
    scored: ScoredRows,
    format_baseline: FormatBaseline | None,
    world: World,
) -> Findings:
    """Find {"train_accuracy", "diagnostics", "warnings"} of a run on comparisons that it has scored.

    Where the set holds both users that the run knows and strangers, the former are held against baselines.
    """
    data, rows, margins, table_rows = scored
    trained = world.from_rank_zero(
        lambda: training_accuracy(restored.run.read_metrics(), restored.step)
    )
    table, known = data.comparisons[rows], table_rows >= 0
    seen, unseen = (
        scored_pairs(data, rows[known], margins[known]),
        scored_pairs(data, rows[~known], margins[~known]),
    )
    subject, chosen = (seen, known) if known.any() else (unseen, ~known)
    labels = table["label"].astype(float)
    lengths = length_margins(data, table)
    formats = None if format_baseline is None else format_baseline.margins(data, table)
    baselines = (
        None if baseline is None else correctness(baseline, labels)[chosen]
        for baseline in (lengths, formats)
    )
    held_out = not (data is restored.data and (table["split"] == 0).all())
    warnings = [
        *unseen_above_seen(seen, unseen),
        *(both_nearly_perfect(trained, subject, restored.data.info) if held_out else []),
        *no_better_than_surface(subject, *baselines),
    ]
    diagnostics = None
    if restored.parts.needs_users and users.own is not None:
        diagnostics = diagnose(restored.model.head, users.own)
    elif users.encoded is not None:
        diagnostics = diagnose_latent(users.encoded)
    return {"train_accuracy": trained, "diagnostics": diagnostics, "warnings": warnings}


def scored_pairs(data: PreparedData, rows: np.ndarray, margins: np.ndarray) -> ScoredPairs:
    """Comparisons of prepared data with the margins found for them."""
    table = data.comparisons[rows]
    right = correctness(margins, table["label"].astype(float))
    return ScoredPairs(right, data.response_prompt[table["a"]])
