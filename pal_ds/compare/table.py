"""The table of a suite's finished runs, as numbers (table.json) and as a page (table.md)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from pal_ds.compare.intervals import AccuracyFigure, Figure, mean_interval, summary_of
from pal_ds.compare.suite import PlannedRun, Suite
from pal_ds.config.changes import changed_keys
from pal_ds.io.files import write_atomically, write_json

COLUMNS = {
    "accuracy": "seen users",
    "controversial": "controversial pairs",
    "user_accuracy_mean": "mean over users",
    "worst_decile_user_accuracy": "worst tenth of users",
    "ece": "ECE",
    "brier": "Brier",
    "bayes_accuracy": "best possible",
    "length_baseline_accuracy": "longer wins",
}
"""Figures of eval/NAME.json that the table shows where every run of a method has them, and their headings."""


class FewShotRow(TypedDict):
    """A method's accuracy on held-out users who were fitted to one number of comparisons."""

    num_comparisons: int
    users: int
    test_pairs: int
    bayes_accuracy: NotRequired[float]
    mean_comparisons: float
    """Fewer than `num_comparisons` where some users have not so many."""
    accuracy: AccuracyFigure


class Warned(TypedDict):
    """A warning, and the seeds whose runs gave it."""

    seeds: list[int]
    text: str


class MethodRow(TypedDict):
    """A method in the table: a figure under each name of COLUMNS that all its runs have."""

    runs: list[str]
    pairs: int
    accuracy: AccuracyFigure
    controversial: NotRequired[Figure]
    user_accuracy_mean: NotRequired[Figure]
    worst_decile_user_accuracy: NotRequired[Figure]
    ece: NotRequired[Figure]
    brier: NotRequired[Figure]
    bayes_accuracy: NotRequired[Figure]
    length_baseline_accuracy: NotRequired[Figure]
    few_shot: list[FewShotRow]
    warnings: list[Warned]


class ComparedData(TypedDict):
    """The prepared data that all methods were trained and scored on."""

    path: str
    hash: str


class Table(TypedDict):
    """table.json."""

    suite: str
    about: str
    data: ComparedData
    split: str
    seeds: list[int]
    methods: dict[str, MethodRow]
    """Rows of the methods whose runs are all evaluated."""
    not_finished: list[str]


def few_shot_of(planned: PlannedRun, suite: Suite) -> dict[str, Any] | None:
    """Return the few-shot figures with the suite's values and draws at the last checkpoint, or None."""
    figures = evaluation_of(planned, "few_shot")
    if figures is None:
        return None
    settings = suite.settings
    wanted = [(count, settings.num_draws) for count in settings.few_shot]
    made = [(row["num_comparisons"], len(row["accuracy_by_seed"])) for row in figures["curve"]]
    return figures if made == wanted else None


def evaluation_of(planned: PlannedRun, name: str) -> dict[str, Any] | None:
    """Return the figures eval/NAME.json of the run's last checkpoint, or None."""
    path = planned.run.eval / f"{name}.json"
    if not path.is_file():
        return None
    figures = json.loads(path.read_text())
    # An evaluation of an earlier checkpoint, or with users of another table, is not that of the finished run.
    own = figures["step"] in planned.run.complete_steps()[-1:] and not figures.get("adapted_users")
    return figures if own else None


def is_finished(planned: PlannedRun) -> bool:
    """Return True where the run of this very recipe was trained to its last update."""
    run = planned.run
    if (run.status() or {}).get("state") != "finished" or not run.config_file.is_file():
        return False
    # With `--only`, runs are tabulated that nobody has held against the suite as it is now.
    return not changed_keys(run.config_file.read_text(), planned.recipe)


def is_evaluated(planned: PlannedRun, suite: Suite) -> bool:
    """Return True where everything is there that the table says of the run."""
    return (
        is_finished(planned)
        and evaluation_of(planned, suite.settings.split) is not None
        and (not suite.settings.few_shot or few_shot_of(planned, suite) is not None)
    )


def tabulate(suite: Suite, data: ComparedData) -> Table:
    """Return table.json: every method of the suite whose runs are all evaluated, and the names of the others.

    `data` says what was compared on. Intervals "over_seeds" are t-intervals of the mean over runs with different
    seeds, null for fewer than three; "within_seed" are those of single runs, clustered by prompt, their ends averaged.
    """
    settings = suite.settings
    methods, missing = {}, []
    for method in settings.methods:
        runs = suite.of(method)
        if all(is_evaluated(planned, suite) for planned in runs):
            methods[method] = _method(suite, runs)
        else:
            missing.append(method)
    return {
        "suite": suite.name,
        "about": settings.about,
        "data": data,
        "split": settings.split,
        "seeds": settings.seeds,
        "methods": methods,
        "not_finished": missing,
    }


def _method(suite: Suite, runs: list[PlannedRun]) -> MethodRow:
    evaluations = [evaluation_of(planned, suite.settings.split) or {} for planned in runs]
    columns: dict[str, Figure] = {}
    for name in COLUMNS:
        values = [figures.get(name) for figures in evaluations]
        parts: list[dict[str, Any]] = [
            part if isinstance(part, dict) else {"accuracy": part} for part in values
        ]
        values = [part.get("accuracy") for part in parts]
        if all(value is not None for value in values):
            figure = summary_of(values)  # type: ignore[arg-type]
            if "pairs" in parts[0]:
                figure["pairs"] = parts[0]["pairs"]
            columns[name] = figure
    accuracy: AccuracyFigure = {
        **columns["accuracy"],
        "ci95_within_seed": _within_seed(evaluations),
    }
    few_shot = [few_shot_of(planned, suite) or {"curve": []} for planned in runs]
    curves = [figures["curve"] for figures in few_shot]
    warnings: dict[str, list[int]] = {}
    for seed, *parts in zip(suite.settings.seeds, evaluations, few_shot, strict=True):
        for text in dict.fromkeys(text for part in parts for text in part.get("warnings", ())):
            warnings.setdefault(text, []).append(seed)
    row = {
        "runs": [str(planned.run.path) for planned in runs],
        "pairs": evaluations[0]["pairs"],
        **columns,
        "accuracy": accuracy,
        "few_shot": [_few_shot_row(rows) for rows in zip(*curves, strict=True)],
        "warnings": [{"seeds": seeds, "text": text} for text, seeds in warnings.items()],
    }
    return cast(MethodRow, row)


def _few_shot_row(rows: tuple[dict[str, Any], ...]) -> FewShotRow:
    """Return the row of one value of k over the runs: the accuracy of a run is the mean over its draws."""
    kept = ("num_comparisons", "users", "test_pairs", "bayes_accuracy")
    facts = {name: rows[0][name] for name in kept if name in rows[0]}
    mean_comparisons = sum(row["mean_comparisons"] for row in rows) / len(rows)
    accuracy: AccuracyFigure = {
        **summary_of([row["accuracy"] for row in rows]),
        "ci95_within_seed": _within_seed(rows),
    }
    row = {**facts, "mean_comparisons": mean_comparisons, "accuracy": accuracy}
    return cast(FewShotRow, row)


def _within_seed(figures: Sequence[dict[str, Any]]) -> list[float] | None:
    """Return the mean interval of accuracies of several runs on the same pairs; None where they have no intervals."""
    intervals = [part["accuracy_ci95"] for part in figures if "accuracy_ci95" in part]
    return mean_interval(intervals) if len(intervals) == len(figures) else None


def write_table(table: Table, out: Path) -> None:
    """Write OUT/table.json and OUT/table.md."""
    write_json(out / "table.json", table)
    write_atomically(out / "table.md", "\n".join(page(table)) + "\n")


def page(table: Table) -> list[str]:
    """Return the lines of table.md."""
    data, methods = table["data"], table["methods"]
    seeds = ", ".join(map(str, table["seeds"]))
    lines = [f"# {table['suite']}", ""]
    lines += [table["about"].strip(), ""] if table["about"] else []
    lines += [
        f"Split {table['split']} of {data['path']} (hash {data['hash']}), seeds {seeds}. Intervals are 95%: over seeds "
        "by Student's t (from three seeds on), and within a seed over prompts, whose pairs stand or fall together.",
        "",
    ]
    if methods:
        lines += _accuracy_table(methods)
    if any(row["few_shot"] for row in methods.values()):
        lines += ["", "## New users by number of comparisons", "", *_few_shot_table(methods)]
    for method, row in methods.items():
        for warning in row["warnings"]:
            seeds = f"seed {', '.join(map(str, warning['seeds']))}"
            lines += ["", f"Warning, {method}, {seeds}: {warning['text']}"]
    if table["not_finished"]:
        lines += ["", f"Not finished: {', '.join(table['not_finished'])}."]
    pictures = {"table": "Accuracy", "few_shot": "New users"} if methods else {}
    shown = [name for name in pictures if name == "table" or any_few_shot(table)]
    return lines + [line for name in shown for line in ("", f"![{pictures[name]}]({name}.png)")]


def any_few_shot(table: Table) -> bool:
    """Return True where any method was evaluated on new users."""
    return any(row["few_shot"] for row in table["methods"].values())


def _accuracy_table(methods: dict[str, MethodRow]) -> list[str]:
    names = [name for name in COLUMNS if any(name in row for row in methods.values())]
    headings = ["method", "pairs", *(COLUMNS[name] for name in names)]
    headings.insert(3, "within a seed")
    lines = _header(headings)
    for method, row in methods.items():
        cells = [_cell(row.get(name)) for name in names]
        within_seed = row["accuracy"]["ci95_within_seed"]
        assert within_seed is not None, "every evaluation gives the interval of its accuracy"
        low, high = within_seed
        cells.insert(1, f"{low:.3f}-{high:.3f}")
        lines.append(_line([method, f"{row['pairs']:,}", *cells]))
    return lines


def _few_shot_table(methods: dict[str, MethodRow]) -> list[str]:
    curves = {name: row["few_shot"] for name, row in methods.items() if row["few_shot"]}
    counts = [str(row["num_comparisons"]) for row in next(iter(curves.values()))]
    lines = _header(["method", *counts])
    lines += [_line([name, *(_cell(row["accuracy"]) for row in curves[name])]) for name in curves]
    return lines


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    interval = figure["ci95_over_seeds"]
    # Of what no seed changes, such as the best possible accuracy, there is nothing more to say.
    if interval is None or interval[0] == interval[1]:
        return f"{figure['mean']:.3f}"
    return f"{figure['mean']:.3f} ({interval[0]:.3f}-{interval[1]:.3f})"


def _header(headings: list[str]) -> list[str]:
    return [_line(headings), "|" + "---|" * len(headings)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
