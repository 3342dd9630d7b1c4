"""The table of a suite's finished runs as numbers: table.json."""

from collections.abc import Mapping, Sequence
from typing import cast

from pal_ds.compare.evaluations import (
    Evaluation,
    Evaluations,
    evaluations_of,
    few_shot_of,
    scratch_of,
)
from pal_ds.compare.intervals import (
    Figure,
    Gain,
    gain_by_prompt,
    gain_over_folds,
    mean_interval,
    summary_over_folds,
)
from pal_ds.compare.schema import FewShotRow, MethodRow, Table, Warned
from pal_ds.compare.suite import Suite
from pal_ds.data.tables import PreparedData
from pal_ds.eval.scratch_users import NAME

COLUMNS = {
    "accuracy": "seen users",
    "everyone": "with unseen users",
    "controversial": "controversial pairs",
    "user_accuracy_mean": "mean over users",
    "worst_decile_user_accuracy": "worst tenth of users",
    "ece": "ECE",
    "brier": "Brier",
    "bayes_accuracy": "best possible",
    "length_baseline_accuracy": "longer wins",
}
"""Figures of an evaluation that the table shows where every run of a method has them, and their headings."""


def tabulate(suite: Suite, data: Mapping[str, PreparedData]) -> Table:
    """Return table.json: every method of the suite whose runs are all evaluated, and the names of the others.

    `data` is by fold, under the empty name where the suite has none. Intervals "over_seeds" are t-intervals of the mean
    over runs with different seeds, null for fewer than three; "within_seed" are those of single runs, clustered by
    prompt, their ends averaged; "over_folds" are t-intervals of the mean over folds. A gain is paired by fold, or by
    prompt where there are no folds.
    """
    settings, folds = suite.settings, suite.folds
    rows: dict[str, MethodRow] = {}
    evaluated: dict[str, Evaluations] = {}
    for method in settings.methods:
        evaluations = evaluations_of(suite, method, data)
        if evaluations is not None:
            evaluated[method] = evaluations
            rows[method] = _method(suite, method, evaluations)
    baselines = {}
    scratch = {fold: scratch_of(suite, fold, data.get(fold)) for fold in folds}
    if settings.scratch and all(scratch.values()):
        evaluated[NAME] = {fold: [figures] for fold, figures in scratch.items() if figures}
        baselines[NAME] = _row(evaluated[NAME])
        baselines[NAME]["few_shot"] = _scratch_curve(suite)
    reference = settings.reference_method
    for method, row in (*rows.items(), *baselines.items()):
        if method != reference and reference in rows:
            gain = _gain(row, rows[reference], evaluated[method], evaluated[reference], reference)
            if gain is not None:
                row["gain"] = gain
    return {
        "suite": suite.name,
        "about": settings.about,
        "data": {
            fold: {"path": str(of_fold.path), "hash": of_fold.hash}
            for fold, of_fold in data.items()
        },
        "split": settings.split,
        "seeds": settings.seeds,
        "reference": reference,
        "methods": rows,
        "baselines": baselines,
        "not_finished": [method for method in settings.methods if method not in rows],
    }


def _gain(
    row: MethodRow, reference: MethodRow, own: Evaluations, others: Evaluations, over: str
) -> Gain | None:
    by_fold, of_reference = (
        one.get("everyone", one["accuracy"]).get("by_fold") for one in (row, reference)
    )
    if by_fold is not None and of_reference is not None:
        return gain_over_folds(by_fold, of_reference, over)
    # Evaluations of an earlier version do not say.
    if not all("by_prompt" in figures for side in (own, others) for figures in side[""]):
        return None
    counts = [[figures["by_prompt"] for figures in side[""]] for side in (own, others)]
    return gain_by_prompt(counts[0], counts[1], over)


def _method(suite: Suite, method: str, evaluations: Evaluations) -> MethodRow:
    """Return the row of a method whose runs are all evaluated."""
    row = _row(evaluations)
    runs = {fold: suite.of(method, fold) for fold in suite.folds}
    few_shot = {
        fold: [few_shot_of(planned, suite) or {"curve": []} for planned in of_fold]
        for fold, of_fold in runs.items()
    }
    row["runs"] = [str(planned.run.path) for of_fold in runs.values() for planned in of_fold]
    row["few_shot"] = _few_shot_rows(
        {fold: [_points(figures) for figures in of_fold] for fold, of_fold in few_shot.items()}
    )
    row["warnings"] = _warnings(suite.settings.seeds, evaluations, few_shot)
    return row


def _points(figures: Evaluation) -> list[Evaluation]:
    """Points of a few-shot curve, each with the gain over the regression beside it where that was drawn."""
    scratch = figures.get("scratch") or [{}] * len(figures["curve"])
    kept = ("gain", "gain_ci95")
    return [
        {**point, **{key: other[key] for key in kept if key in other}}
        for point, other in zip(figures["curve"], scratch, strict=True)
    ]


def _scratch_curve(suite: Suite) -> list[FewShotRow]:
    """Rows of the regressions' curve, which all runs on the same frozen features have alike; of the first evaluated."""
    curves = {}
    for fold in suite.folds:
        runs = (planned for planned in suite.planned if planned.fold == fold)
        figures = next(filter(None, (few_shot_of(planned, suite) for planned in runs)), None)
        points = (figures or {}).get("scratch", [])
        # The gain is that of the run beside which they were drawn.
        curves[fold] = [[{k: v for k, v in point.items() if k[:4] != "gain"} for point in points]]
    return _few_shot_rows(curves)


def _few_shot_rows(curves: dict[str, list[list[Evaluation]]]) -> list[FewShotRow]:
    """Return a row for each value of k of curves by fold and seed; a run's accuracy is the mean over its draws."""
    rows = []
    every = [points for of_fold in curves.values() for points in of_fold]
    for place, _ in enumerate(min(every, key=len)):
        points = [curve[place] for curve in every]
        first_of_folds = [of_fold[0][place] for of_fold in curves.values()]
        values = {
            fold: [curve[place]["accuracy"] for curve in of_fold]
            for fold, of_fold in curves.items()
        }
        row = {
            "num_comparisons": points[0]["num_comparisons"],
            "users": sum(point["users"] for point in first_of_folds),
            "test_pairs": sum(point["test_pairs"] for point in first_of_folds),
            "mean_comparisons": _mean(points, "mean_comparisons"),
            "accuracy": {**summary_over_folds(values), "ci95_within_seed": _within_seed(points)},
        }
        for name in ("bayes_accuracy", "gain"):
            if all(name in point for point in points):
                row[name] = _mean(points, name)
        if "gain" in row:
            row["gain_ci95"] = mean_interval([point["gain_ci95"] for point in points])
        rows.append(cast(FewShotRow, row))
    return rows


def _mean(points: Sequence[Evaluation], name: str) -> float:
    return sum(point[name] for point in points) / len(points)


def _warnings(seeds: list[int], *evaluations: Evaluations) -> list[Warned]:
    """Collect each warning with the seeds, and the folds, whose runs gave it."""
    given: dict[str, tuple[dict[int, None], dict[str, None]]] = {}
    for of_kind in evaluations:
        for fold, of_fold in of_kind.items():
            for seed, figures in zip(seeds, of_fold, strict=True):
                for text in figures.get("warnings", ()):
                    of_text = given.setdefault(text, ({}, {}))
                    of_text[0][seed] = of_text[1][fold] = None
    warnings: list[Warned] = []
    for text, (by_seed, by_fold) in given.items():
        warning: Warned = {"seeds": sorted(by_seed), "text": text}
        if [*by_fold] != [""]:
            warning["folds"] = [*by_fold]
        warnings.append(warning)
    return warnings


def _row(evaluations: Evaluations) -> MethodRow:
    """Return the row of some evaluations without what is of runs alone."""
    every = [figures for of_fold in evaluations.values() for figures in of_fold]
    columns: dict[str, Figure] = {}
    for name in COLUMNS:
        parts = {
            fold: [_part(figures, name) for figures in of_fold]
            for fold, of_fold in evaluations.items()
        }
        figure = _figure(parts)
        if figure is not None:
            columns[name] = figure
    if columns["everyone"]["by_seed"] == columns["accuracy"]["by_seed"]:
        del columns["everyone"]  # nobody is a stranger
    above = {}
    for number in every[0].get("users_above", {}):
        parts = {
            fold: [{"accuracy": figures["users_above"][number]} for figures in of_fold]
            for fold, of_fold in evaluations.items()
        }
        if (figure := _figure(parts)) is not None:
            above[number] = figure
    row = {
        "runs": [],
        "pairs": sum(of_fold[0]["pairs"] for of_fold in evaluations.values()),
        **columns,
        "accuracy": {**columns["accuracy"], "ci95_within_seed": _within_seed(every)},
        **({"users_above": above} if above else {}),
        "few_shot": [],
        "warnings": [],
    }
    return cast(MethodRow, row)


def _part(figures: Evaluation, name: str) -> Evaluation:
    """Return {"accuracy", "pairs"?} of a figure, whatever it is called."""
    value = figures.get(name)
    return value if isinstance(value, dict) else {"accuracy": value}


def _figure(parts: Evaluations) -> Figure | None:
    """Summarise values by fold and seed; None where a run has none."""
    values = {fold: [part["accuracy"] for part in of_fold] for fold, of_fold in parts.items()}
    if any(value is None for of_fold in values.values() for value in of_fold):
        return None
    figure = summary_over_folds(values)
    firsts = [of_fold[0] for of_fold in parts.values()]
    if all("pairs" in part for part in firsts):
        figure["pairs"] = sum(part["pairs"] for part in firsts)
    return figure


def _within_seed(figures: Sequence[Evaluation]) -> list[float] | None:
    """Return the mean interval of accuracies of several runs on the same pairs; None where they have no intervals."""
    intervals = [part["accuracy_ci95"] for part in figures if "accuracy_ci95" in part]
    return mean_interval(intervals) if len(intervals) == len(figures) else None
