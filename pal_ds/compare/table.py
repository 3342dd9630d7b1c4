"""What is known of a suite's finished runs: one table as numbers (table.json) and as a page (table.md)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pal_ds.compare.intervals import mean_interval, summary_of
from pal_ds.compare.suite import PlannedRun, Suite
from pal_ds.config.recipe import changed_keys
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


def evaluation_of(planned: PlannedRun, split: str) -> dict[str, Any] | None:
    """The figures of the split at the run's last checkpoint, or None."""
    return _result(planned, split)


def few_shot_of(planned: PlannedRun, suite: Suite) -> dict[str, Any] | None:
    """The few-shot figures with the suite's values and draws at the run's last checkpoint, or None."""
    figures = _result(planned, "few_shot")
    if figures is None:
        return None
    settings = suite.settings
    wanted = [(count, settings.num_draws) for count in settings.few_shot]
    made = [(row["num_comparisons"], len(row["accuracy_by_seed"])) for row in figures["curve"]]
    return figures if made == wanted else None


def _result(planned: PlannedRun, name: str) -> Any:
    path = planned.run.eval / f"{name}.json"
    if not path.is_file():
        return None
    figures = json.loads(path.read_text())
    # An evaluation of an earlier checkpoint, or with users of another table, is not that of the finished run.
    own = figures["step"] in planned.run.complete_steps()[-1:] and not figures.get("adapted_users")
    return figures if own else None


def is_finished(planned: PlannedRun) -> bool:
    """Whether the run of this very recipe was trained to its last update."""
    run = planned.run
    if (run.status() or {}).get("state") != "finished" or not run.config_file.is_file():
        return False
    # With `--only`, runs are tabulated that nobody has held against the suite as it is now.
    return not changed_keys(run.config_file.read_text(), planned.recipe)


def is_evaluated(planned: PlannedRun, suite: Suite) -> bool:
    """Whether everything is there that the table says of the run."""
    return (
        is_finished(planned)
        and evaluation_of(planned, suite.settings.split) is not None
        and (not suite.settings.few_shot or few_shot_of(planned, suite) is not None)
    )


def tabulate(suite: Suite, data: dict[str, Any]) -> dict[str, Any]:
    """The content of table.json: every method of the suite whose runs are all evaluated, and the names of the others.

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
    facts = {"suite": suite.name, "about": settings.about, "data": data, "split": settings.split}
    return {**facts, "seeds": settings.seeds, "methods": methods, "not_finished": missing}


def _method(suite: Suite, runs: list[PlannedRun]) -> dict[str, Any]:
    evaluations = [evaluation_of(planned, suite.settings.split) or {} for planned in runs]
    row: dict[str, Any] = {"runs": [str(planned.run.path) for planned in runs]}
    row["pairs"] = evaluations[0]["pairs"]
    for name in COLUMNS:
        values = [figures.get(name) for figures in evaluations]
        parts = [part if isinstance(part, dict) else {"accuracy": part} for part in values]
        values = [part.get("accuracy") for part in parts]
        if all(value is not None for value in values):
            row[name] = summary_of(values)  # type: ignore[arg-type]
            row[name] |= {"pairs": parts[0]["pairs"]} if "pairs" in parts[0] else {}
    row["accuracy"]["ci95_within_seed"] = _within_seed(evaluations)
    few_shot = [few_shot_of(planned, suite) or {"curve": []} for planned in runs]
    curves = [figures["curve"] for figures in few_shot]
    row["few_shot"] = [_few_shot_row(rows) for rows in zip(*curves, strict=True)]
    warnings: dict[str, list[int]] = {}
    for seed, *parts in zip(suite.settings.seeds, evaluations, few_shot, strict=True):
        for text in dict.fromkeys(text for part in parts for text in part.get("warnings", ())):
            warnings.setdefault(text, []).append(seed)
    row["warnings"] = [{"seeds": seeds, "text": text} for text, seeds in warnings.items()]
    return row


def _few_shot_row(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """One value of k over the runs: the accuracy of a run is the mean over its draws."""
    kept = ("num_comparisons", "users", "test_pairs", "bayes_accuracy")
    facts = {name: rows[0][name] for name in kept if name in rows[0]}
    given = {"mean_comparisons": sum(row["mean_comparisons"] for row in rows) / len(rows)}
    accuracy = summary_of([row["accuracy"] for row in rows])
    accuracy["ci95_within_seed"] = _within_seed(rows)
    return {**facts, **given, "accuracy": accuracy}


def _within_seed(figures: Sequence[dict[str, Any]]) -> list[float] | None:
    """Of accuracies of several runs on the same pairs; None where they come without intervals."""
    intervals = [part["accuracy_ci95"] for part in figures if "accuracy_ci95" in part]
    return mean_interval(intervals) if len(intervals) == len(figures) else None


def write_table(table: dict[str, Any], out: Path) -> None:
    """OUT/table.json and OUT/table.md."""
    write_json(out / "table.json", table)
    write_atomically(out / "table.md", "\n".join(page(table)) + "\n")


def page(table: dict[str, Any]) -> list[str]:
    """The lines of table.md."""
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


def any_few_shot(table: dict[str, Any]) -> bool:
    """Whether any method was held against new users."""
    return any(row["few_shot"] for row in table["methods"].values())


def _accuracy_table(methods: dict[str, Any]) -> list[str]:
    names = [name for name in COLUMNS if any(name in row for row in methods.values())]
    headings = ["method", "pairs", *(COLUMNS[name] for name in names)]
    headings.insert(3, "within a seed")
    lines = _header(headings)
    for method, row in methods.items():
        cells = [_cell(row.get(name)) for name in names]
        low, high = row["accuracy"]["ci95_within_seed"]
        cells.insert(1, f"{low:.3f}-{high:.3f}")
        lines.append(_line([method, f"{row['pairs']:,}", *cells]))
    return lines


def _few_shot_table(methods: dict[str, Any]) -> list[str]:
    curves = {name: row["few_shot"] for name, row in methods.items() if row["few_shot"]}
    counts = [str(row["num_comparisons"]) for row in next(iter(curves.values()))]
    lines = _header(["method", *counts])
    lines += [_line([name, *(_cell(row["accuracy"]) for row in curves[name])]) for name in curves]
    return lines


def _cell(figure: dict[str, Any] | None) -> str:
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
