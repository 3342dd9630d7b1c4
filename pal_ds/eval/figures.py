"""Figures of an evaluation from gathered margins: accuracy, calibration, diagnostics, warnings."""

from typing import cast

import numpy as np

from pal_ds.data.tables import PreparedData, best_accuracy, preferences, targets
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.eval import sanity_checks
from pal_ds.eval.baselines import FormatBaseline, length_margins
from pal_ds.eval.diagnostics import diagnose, diagnose_latent
from pal_ds.eval.metrics import (
    LabelledPairs,
    controversial,
    correctness,
    evaluation_figures,
    fit_temperature,
)
from pal_ds.eval.schema import (
    EvaluationFigures,
    MarginHistogram,
    PairFigures,
    PromptCounts,
    TieFigures,
)
from pal_ds.eval.tie_figures import ThreeWay, tie_figures
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.inference.load_run import OpenRun
from pal_ds.inference.readers import KnownUsers, Reader
from pal_ds.users.ids import UserIds

NUM_MARGIN_BINS = 30


def figures_of(
    data: PreparedData,
    rows: np.ndarray,
    margins: np.ndarray,
    temperature: float = 1.0,
    format_baseline: FormatBaseline | None = None,
) -> PairFigures:
    """Compute the figures of `eval/NAME.json`, without ties; `format_baseline` was counted on the training data."""
    rows, margins = without_ties(data, rows, margins)
    table = data.comparisons[rows]
    owners, owner = np.unique(table["user"], return_inverse=True)
    names = np.asarray([data.users[owner] for owner in owners], str)
    pairs = LabelledPairs(
        labels=table["label"].astype(float),
        user_ids=names[owner],
        prompts=data.response_prompt[table["a"]],
        probabilities=table["probability"].astype(float),
        best_accuracy=best_accuracy(table),
        controversial=controversial(table),
    )
    lengths, formats = _baseline_margins(data, table, format_baseline)
    figures = evaluation_figures(
        margins, pairs, temperature=temperature, length_margins=lengths, format_margins=formats
    )
    return {**figures, "margins": margin_histogram(margins, pairs.labels)}


def prompt_counts(data: PreparedData, rows: np.ndarray, margins: np.ndarray) -> PromptCounts:
    """Count the comparisons `rows` of each prompt, and those that their margins rank rightly."""
    rows, margins = without_ties(data, rows, margins)
    table = data.comparisons[rows]
    prompts, index = np.unique(data.response_prompt[table["a"]], return_inverse=True)
    right = correctness(margins, table["label"].astype(float))
    return {
        "prompts": prompts.tolist(),
        "pairs": np.bincount(index).tolist(),
        "right": np.bincount(index, weights=right).tolist(),
    }


def without_ties(
    data: PreparedData, rows: np.ndarray, margins: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and margins of those of the comparisons `rows` that prefer one response."""
    if data.is_hard:
        return rows, margins
    is_sure = preferences(data.comparisons[rows]) != 0
    return rows[is_sure], margins[is_sure]


def margin_histogram(
    margins: Float[np.ndarray, "n"], labels: Float[np.ndarray, "n"]
) -> MarginHistogram | None:
    """Count margins in `NUM_MARGIN_BINS` equal bins, those of pairs that are ranked rightly being positive.

    The bins reach as far as 99% of the margins, on both sides of 0. None for no margins, or one that is no number.

    >>> counted = margin_histogram(np.array([1.0, -1.0, 3.0]), np.array([1.0, 1.0, 1.0]))
    >>> sum(counted["pairs"]), counted["edges"][0] == -counted["edges"][-1]
    (3, True)
    """
    if len(margins) == 0 or not np.isfinite(margins).all():
        return None
    signed = margins * np.sign(labels)
    reach = float(np.quantile(np.abs(signed), 0.99)) or 1.0
    edges = np.linspace(-reach, reach, NUM_MARGIN_BINS + 1)
    counts = np.histogram(np.clip(signed, -reach, reach), edges)[0]
    return {"edges": edges.tolist(), "pairs": counts.tolist()}


def _baseline_margins(
    data: PreparedData, table: np.ndarray, format_baseline: FormatBaseline | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Margins by length and by format."""
    formats = None if format_baseline is None else format_baseline.margins(data, table)
    return length_margins(data, table), formats


def dev_temperature(margins: np.ndarray, labels: np.ndarray, loss_kind: str) -> float:
    """1 under the logistic loss, whose margins are log-odds; else fitted on these held-out pairs."""
    if loss_kind == "logistic" or len(margins) == 0:
        return 1.0
    return fit_temperature(margins, labels)


def report_on(
    restored: OpenRun,
    known: KnownUsers,
    reader: Reader,
    rows: np.ndarray,
    margins: np.ndarray,
    calibration: tuple[float, ThreeWay | None],
    world: World,
) -> EvaluationFigures:
    """Compute the figures of comparisons that a run has scored, those of strangers under "unknown_users".

    `calibration` is (the temperature of margins, the model of ties).

    Where the set holds both users that the run knows and strangers, warnings hold the former against baselines.
    """
    data, (temperature, three_way) = reader.collator.data, calibration
    of_ties = _of_ties(known, reader, rows, margins / temperature, three_way)
    rows, margins = without_ties(data, rows, margins)
    table = data.comparisons[rows]
    is_known = reader.collator.user_rows(rows) >= 0
    format_baseline = FormatBaseline.of(restored.data)
    figures, unknown = (
        figures_of(data, rows[who], margins[who], temperature, format_baseline)
        for who in (is_known, ~is_known)
    )
    is_removed = ~is_known & _was_removed(restored, data)[table["user"]]
    seen, others, unseen = (
        scored_pairs(data, rows[who], margins[who])
        for who in (is_known, ~is_known, ~is_known & ~is_removed)
    )
    subject, chosen = (seen, is_known) if is_known.any() else (others, ~is_known)
    baselines = (
        None if baseline is None else correctness(baseline, table["label"].astype(float))[chosen]
        for baseline in _baseline_margins(data, table, format_baseline)
    )
    trained = world.from_rank_zero(
        lambda: sanity_checks.training_accuracy(restored.run.read_metrics(), restored.step)
    )
    held_out = not (data is restored.data and (table["split"] == 0).all())
    diagnostics, model_head, collapsed = None, restored.model.head, []
    if restored.parts.needs_users and known.own is not None:
        diagnostics = diagnose(model_head, known.own[:, : model_head.num_prototypes])
    elif known.encoded is not None:
        diagnostics = diagnose_latent(known.encoded)
        collapsed = sanity_checks.no_unit_in_use(diagnostics["active_units"])
    warnings = sanity_checks.unseen_above_seen(seen, unseen)
    warnings += sanity_checks.of_removed_users(int(is_removed.sum()))
    if held_out:
        warnings += sanity_checks.both_nearly_perfect(trained, subject, restored.data.info)
        warnings += sanity_checks.learnt_by_heart(trained, seen)
    warnings += sanity_checks.no_better_than_surface(subject, *baselines)
    warnings += [*sanity_checks.without_a_number(margins), *collapsed]
    of_run = {"train_accuracy": trained, "diagnostics": diagnostics, "warnings": warnings}
    return cast(EvaluationFigures, {**figures, "unknown_users": unknown, **of_ties, **of_run})


def _of_ties(
    known: KnownUsers,
    reader: Reader,
    rows: np.ndarray,
    log_odds: np.ndarray,
    three_way: ThreeWay | None,
) -> dict[str, TieFigures]:
    """Figures of ties under "ties", by each user's own threshold where users have one; none for data without ties."""
    data = reader.collator.data
    if not data.num_ties:
        return {}
    table, factor = data.comparisons[rows], None
    if known.log_tie_threshold is not None:
        # A stranger's row is -1, and the last entry a stranger's.
        factor = known.log_tie_threshold.double().cpu().numpy()[reader.collator.user_rows(rows)]
    labels, shares = table["label"].astype(float), targets(table)
    made = tie_figures(log_odds, labels, three_way, shares=shares, log_factor=factor)
    return {"ties": made}


def _was_removed(restored: OpenRun, data: PreparedData) -> np.ndarray:
    """True for users of `data` on whom the run was trained, and whom its table does not hold now; bool [users]."""
    rows = UserIds.of(restored.data.users).find(data.users)
    was_trained = (rows >= 0) & restored.data.user_seen[rows]
    return was_trained & (restored.users.ids.find(data.users) < 0) & (len(restored.users.ids) > 0)


def refuse_no_numbers(scores: np.ndarray, restored: OpenRun) -> None:
    """Raise UserError where a model gives no finite number at all: no figure would say anything of it."""
    if scores.size and not np.isfinite(scores).any():
        raise UserError(
            f"{restored.run.checkpoint(restored.step)}: none of its scores is a finite number: the training had "
            "diverged by then (see metrics.jsonl), or the weights are damaged. Take an earlier --step, or train "
            "again with a lower learning rate."
        )


def scored_pairs(
    data: PreparedData, rows: np.ndarray, margins: np.ndarray
) -> sanity_checks.ScoredPairs:
    """Comparisons of prepared data, ties left out, with the margins found for them."""
    rows, margins = without_ties(data, rows, margins)
    table = data.comparisons[rows]
    right = correctness(margins, table["label"].astype(float))
    return sanity_checks.ScoredPairs(right, data.response_prompt[table["a"]])
