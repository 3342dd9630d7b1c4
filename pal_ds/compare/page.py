"""The table of a suite as a page: table.md."""

from pathlib import Path
from typing import cast

from pal_ds.compare.intervals import Figure
from pal_ds.compare.schema import MethodRow, Table
from pal_ds.compare.table import COLUMNS
from pal_ds.eval.scratch_users import NAME
from pal_ds.io.files import write_atomically, write_json


def write_table(table: Table, out: Path) -> None:
    """Write OUT/table.json and OUT/table.md."""
    write_json(out / "table.json", table)
    write_atomically(out / "table.md", "\n".join(page(table)) + "\n")


def page(table: Table) -> list[str]:
    """Return the lines of table.md."""
    rows = all_rows(table)
    lines = [f"# {table['suite']}", ""]
    lines += [table["about"].strip(), ""] if table["about"] else []
    lines += [_about_figures(table), ""]
    if rows:
        lines += _accuracy_table(table, rows)
    if has_folds(table) and rows:
        lines += ["", "## By fold", "", *_fold_table(rows)]
    if any_few_shot(table):
        lines += ["", "## New users by number of comparisons", "", *_few_shot_table(rows)]
    for method, row in table["methods"].items():
        for warning in row["warnings"]:
            where = [f"seed {', '.join(map(str, warning['seeds']))}"]
            where += [", ".join(warning["folds"])] if "folds" in warning else []
            lines += ["", f"Warning, {method}, {', of '.join(where)}: {warning['text']}"]
    if table["not_finished"]:
        lines += ["", f"Not finished: {', '.join(table['not_finished'])}."]
    pictures = {"table": "Accuracy", "few_shot": "New users"} if table["methods"] else {}
    shown = [name for name in pictures if name == "table" or any_few_shot(table)]
    return lines + [line for name in shown for line in ("", f"![{pictures[name]}]({name}.png)")]


def all_rows(table: Table) -> dict[str, MethodRow]:
    """Return the rows of the methods and, below them, of the baselines."""
    return {**table["methods"], **table["baselines"]}


def has_folds(table: Table) -> bool:
    """Return True where figures are means over folds."""
    return [*table["data"]] not in ([], [""])


def any_few_shot(table: Table) -> bool:
    """Return True where any method was evaluated on new users."""
    return any(row["few_shot"] for row in table["methods"].values())


def _about_figures(table: Table) -> str:
    """Say what was measured on which data, and what the intervals are."""
    seeds = ", ".join(map(str, table["seeds"]))
    if has_folds(table):
        return (
            f"Split {table['split']} of {len(table['data'])} folds, seeds {seeds}; figures are means over folds. "
            "Intervals are 95%: over seeds and over folds by Student's t (from three on); a gain is paired by fold."
        )
    lines = [
        f"Split {table['split']} of {data['path']} (hash {data['hash']}), seeds {seeds}. Intervals are 95%: over seeds "
        "by Student's t (from three seeds on), and within a seed over prompts, whose pairs stand or fall together; a "
        "gain is paired by prompt."
        for data in table["data"].values()
    ]
    return "".join(lines)


def _accuracy_table(table: Table, rows: dict[str, MethodRow]) -> list[str]:
    names = [name for name in COLUMNS if any(name in row for row in rows.values())]
    above = [
        *dict.fromkeys(number for row in rows.values() for number in row.get("users_above", {}))
    ]
    with_folds = has_folds(table)
    headings = [
        "method",
        "pairs",
        COLUMNS[names[0]],
        "over folds" if with_folds else "within a seed",
        f"gain over {table['reference']}",
        *(COLUMNS[name] for name in names[1:]),
        *(f"users with > {number}" for number in above),
    ]
    lines = _header(headings)
    for method, row in rows.items():
        accuracy = row["accuracy"]
        spread = accuracy.get("ci95_over_folds") if with_folds else accuracy["ci95_within_seed"]
        cells = [
            _cell(accuracy),
            "" if spread is None else f"{spread[0]:.3f}-{spread[1]:.3f}",
            _gain_cell(row["gain"]["mean"], row["gain"]["ci95"]) if "gain" in row else "",
            *(_cell(cast(Figure | None, row.get(name))) for name in names[1:]),
            *(_cell(row.get("users_above", {}).get(number)) for number in above),
        ]
        lines.append(_line([method, f"{row['pairs']:,}", *cells]))
    return lines


def _fold_table(rows: dict[str, MethodRow]) -> list[str]:
    """Return a row per fold: accuracy of each method, strangers included where there are any, and by length."""
    columns = {name: row.get("everyone", row["accuracy"]) for name, row in rows.items()}
    longer = next(
        (
            row["length_baseline_accuracy"]
            for row in rows.values()
            if "length_baseline_accuracy" in row
        ),
        None,
    )
    if longer is not None:
        columns[COLUMNS["length_baseline_accuracy"]] = longer
    by_fold = {name: figure.get("by_fold", {}) for name, figure in columns.items()}
    lines = _header(["fold", *columns])
    for fold in next(iter(by_fold.values())):
        lines.append(_line([fold, *(f"{values[fold]:.3f}" for values in by_fold.values())]))
    return lines


def _few_shot_table(rows: dict[str, MethodRow]) -> list[str]:
    curves = {name: row["few_shot"] for name, row in rows.items() if row["few_shot"]}
    counts = [str(row["num_comparisons"]) for row in next(iter(curves.values()))]
    lines = _header(["method", *counts])
    lines += [_line([name, *(_cell(row["accuracy"]) for row in curves[name])]) for name in curves]
    gains = {
        name: [_gain_cell(row["gain"], row.get("gain_ci95")) for row in curve if "gain" in row]
        for name, curve in curves.items()
    }
    gains = {name: cells for name, cells in gains.items() if cells and name != NAME}
    if gains:
        lines += ["", f"Gain over each user's own {NAME}, same draws and pairs:", ""]
        lines += [*_header(["method", *counts]), *(_line([name, *gains[name]]) for name in gains)]
    return lines


def _gain_cell(mean: float, interval: list[float] | None) -> str:
    if interval is None:
        return f"{mean:+.3f}"
    return f"{mean:+.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})"


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
