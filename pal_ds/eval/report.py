"""A page for one run, or several side by side: figures, their differences, warnings, pictures and recipes.

Reads what training and evaluation left in the run directories (metrics.jsonl, eval/test.json, eval/few_shot.json) and
leaves out what has no data. report.md lies beside its pictures; report.html holds them, so it can be sent by itself.
"""

import base64
import datetime
import html
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from scipy import stats

from pal_ds import __version__
from pal_ds.engine.checkpoint.verify import refuse_strangers_run
from pal_ds.eval import report_pictures as pictures
from pal_ds.eval.report_pictures import figures_of
from pal_ds.eval.schema import PrototypeExample
from pal_ds.inference.load_run import OpenRun, open_run
from pal_ds.io.files import new_files
from pal_ds.runs.run_dir import RunDirectory

PICTURES = {
    "learning": "Learning curves",
    "simplex": "Users in the simplex",
    "mixtures": "Users and their prototypes",
    "users": "Accuracy per user",
    "comparisons": "Accuracy against comparisons per user",
    "reliability": "Stated confidence against accuracy",
    "margins": "Margins of the test pairs",
    "prototypes": "Prototypes: share of users, distances",
    "new_users": "New users against number of comparisons",
}
FEWEST_USERS = 3
"""Users below whom a difference of two runs has no interval."""
_STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse } td, th { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left }
td { overflow-wrap: anywhere; min-width: 3rem }
img { max-width: 100% } pre { background: #f5f5f5; padding: .7rem; overflow-x: auto }"""


@dataclass
class _Page:
    """The content of the page, of which markdown and HTML are two forms."""

    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    """Rows by title, the head first."""
    warnings: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)
    """Titles by name."""
    recipes: dict[str, str] = field(default_factory=dict)
    """YAML by run."""


def write_report(
    runs: dict[str, RunDirectory],
    out: Path,
    groups: dict[str, str | None] | None = None,
    *,
    trust: bool = False,
    trust_code: bool = False,
) -> Path:
    """Writes OUT/report.md, its PNGs and OUT/report.html; `groups` colours users by a known group.

    Returns the path of report.md.

    Raises:
        UserError: a run that others may have written to, or that names code of its own, without leave; see `open_run`.
    """
    opened = {
        run.path: open_run(run, trust=trust, trust_code=trust_code)
        for run in runs.values()
        if run.complete_steps()
    }
    if not trust:
        for run in runs.values():
            refuse_strangers_run(run)
    page = _Page()
    page.tables["Figures"] = _figures(runs)
    if differences := _differences(runs, opened):
        page.tables["Differences"] = differences
    page.tables["Runs"] = _facts(runs, opened)
    for name, run in runs.items():
        if examples := (figures_of(run, "test") or {}).get("prototype_examples"):
            page.tables[f"What the prototypes of {name} prefer"] = _preferences(examples)
    page.warnings = _warnings(runs)
    page.recipes = {
        name: run.config_file.read_text(encoding="utf-8")
        for name, run in runs.items()
        if run.config_file.is_file()
    }
    with new_files(out) as folder:
        page.pictures = _draw(folder, runs, opened, groups or {})
        (folder / "report.html").write_text(_html(page, folder), encoding="utf-8")
        (folder / "report.md").write_text(_markdown(page), encoding="utf-8")
    return out / "report.md"


def _draw(
    out: Path,
    runs: dict[str, RunDirectory],
    opened: dict[Path, OpenRun],
    groups: dict[str, str | None],
) -> dict[str, str]:
    """Draw what there is to see; return the titles by name, in the page's order."""
    counts = {path: _comparisons_of_users(one) for path, one in opened.items()}
    panels: dict[str, Callable[[Axes, RunDirectory], bool]] = {
        "simplex": lambda axes, run: pictures.simplex(axes, opened.get(run.path), groups),
        "mixtures": lambda axes, run: pictures.mixtures(axes, opened.get(run.path)),
        "users": pictures.accuracy_per_user,
        "comparisons": lambda axes, run: pictures.accuracy_by_comparisons(
            axes, run, counts.get(run.path, {})
        ),
        "reliability": pictures.reliability,
        "margins": pictures.margins,
        "prototypes": pictures.prototypes,
    }
    drawn = {
        name: pictures.draw_per_run(out / f"{name}.png", runs, draw)
        for name, draw in panels.items()
    }
    drawn["learning"] = pictures.learning(out / "learning.png", runs)
    drawn["new_users"] = pictures.new_users(out / "new_users.png", runs)
    return {name: title for name, title in PICTURES.items() if drawn[name]}


def _comparisons_of_users(opened: OpenRun) -> dict[str, int]:
    """Number of comparisons in training, by user id."""
    data = opened.data
    of_rows = np.bincount(data.comparisons["user"][data.rows("train")], minlength=len(data.users))
    return {data.users[row]: int(count) for row, count in enumerate(of_rows) if count}


def _figures(runs: dict[str, RunDirectory]) -> list[list[str]]:
    head = ["run", "test pairs", "accuracy (95% interval)", "Bayes", "worst tenth of users"]
    rows = [[*head, "controversial", "ECE", "Brier"]]
    for name, run in runs.items():
        figures = figures_of(run, "test")
        if not figures or figures["accuracy_ci95"] is None:
            rows.append([name, "no eval/test.json: run `evaluate` first", *[""] * 6])
            continue
        low, high = figures["accuracy_ci95"]
        # An evaluation of an earlier version lacks the newer figures.
        disputed, controversial = figures.get("controversial"), ""
        if disputed and disputed["pairs"]:
            controversial = f"{_number(disputed['accuracy'])} of {disputed['pairs']}"
        bayes, brier = figures.get("bayes_accuracy"), figures.get("brier")
        worst, ece = figures["worst_decile_user_accuracy"], figures["ece"]
        accuracy = f"{figures['accuracy']:.3f} ({low:.3f}-{high:.3f})"
        row = [name, str(figures["pairs"]), accuracy, _number(bayes), _number(worst), controversial]
        rows.append([*row, _number(ece), _number(brier)])
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _differences(runs: dict[str, RunDirectory], opened: dict[Path, OpenRun]) -> list[list[str]]:
    """Rows of each two runs that were evaluated on the same pairs: by user, so that what both find hard cancels."""
    rows = [["runs", "users", "mean difference of a user's accuracy (95% interval)"]]
    measured = {
        name: (opened[run.path].data.hash, figures["users"])
        for name, run in runs.items()
        if run.path in opened
        and (figures := figures_of(run, "test"))
        and isinstance(figures["users"], dict)
    }
    for first, second in itertools.combinations(measured, 2):
        (data, before), (other_data, after) = measured[first], measured[second]
        if data == other_data and before and before.keys() == after.keys():
            change = [after[user]["accuracy"] - before[user]["accuracy"] for user in before]
            rows.append([f"{second} - {first}", str(len(change)), difference(np.asarray(change))])
    return rows if len(rows) > 1 else []


def difference(change: np.ndarray) -> str:
    """Word the mean of paired differences, fp64 [n], with its 95% t-interval.

    >>> difference(np.array([0.1, 0.2, 0.3]))
    '+0.200 (-0.048 to +0.448)'
    """
    mean, num = float(change.mean()), len(change)
    if num < FEWEST_USERS:
        return f"{mean:+.3f}"
    half = stats.t.ppf(0.975, num - 1) * change.std(ddof=1) / np.sqrt(num)
    return f"{mean:+.3f} ({mean - half:+.3f} to {mean + half:+.3f})"


def _facts(runs: dict[str, RunDirectory], opened: dict[Path, OpenRun]) -> list[list[str]]:
    head = ["run", "directory", "state", "updates", "last written", "pal_ds", "head", "data"]
    rows = [[*head, "hash of data"]]
    for name, run in runs.items():
        status, one = run.status(), opened.get(run.path)
        state, step = (status["state"], str(status["step"])) if status else ("not begun", "0")
        newest = max((f.stat().st_mtime for f in run.path.glob("*.json*")), default=None)
        date = "" if newest is None else f"{datetime.datetime.fromtimestamp(newest):%Y-%m-%d %H:%M}"
        of_data = ["", "", ""]
        if one is not None:
            of_data = [type(one.parts.head).__name__, str(one.data.path), one.data.hash]
        facts = run.installation()
        code = " ".join(
            str(value) for key in ("version", "commit") if (value := facts.get(f"{key} of pal_ds"))
        )
        rows.append([name, str(run.path), state, step, date, code, *of_data])
    return rows


def _preferences(examples: list[list[PrototypeExample]]) -> list[list[str]]:
    rows = [["prototype", "prompt", "it likes more", "than", "its margin (mean of all)"]]
    for number, of_prototype in enumerate(examples, start=1):
        for one in of_prototype:
            margins = f"{one['margin']:+.2f} ({one['mean_margin']:+.2f})"
            rows.append([str(number), one["prompt"], one["likes_more"], one["than"], margins])
    return rows


def _warnings(runs: dict[str, RunDirectory]) -> list[str]:
    """Return what the evaluations of each run warn of."""
    return [
        f"{name}, eval/{file}.json: {warning}"
        for name, run in runs.items()
        for file in ("test", "few_shot")
        for warning in (figures_of(run, file) or {}).get("warnings", [])
    ]


def _made() -> str:
    now = datetime.datetime.now().astimezone()
    return f"Made on {now:%Y-%m-%d %H:%M %Z} by pal_ds {__version__}."


def _markdown(page: _Page) -> str:
    lines = ["# Report", "", _made(), ""]
    for title, (head, *rows) in page.tables.items():
        marked = [[_escaped(cell) for cell in row] for row in rows]
        lines += [f"## {title}", "", _row(head), _row(["---"] * len(head)), *map(_row, marked), ""]
    if page.warnings:
        lines += ["## Warnings", "", *(f"- {warning}" for warning in page.warnings), ""]
    for name, title in page.pictures.items():
        lines += [f"## {title}", "", f"![{title}]({name}.png)", ""]
    return "\n".join(lines)


def _escaped(cell: str) -> str:
    """A text of people on one line of markdown, in which it makes no link, picture, element or column."""
    return re.sub(r"([\\`\[\]<|])", r"\\\1", " ".join(cell.split()))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _html(page: _Page, out: Path) -> str:
    """One file that asks for no other: pictures lie in it, and nothing that a name holds is taken for markup."""
    parts = [f"<h1>Report</h1><p>{html.escape(_made())}</p>"]
    for title, (head, *rows) in page.tables.items():
        parts.append(f"<h2>{html.escape(title)}</h2><table>{_html_row(head, 'th')}")
        parts += [*(_html_row(row, "td") for row in rows), "</table>"]
    if page.warnings:
        listed = "".join(f"<li>{html.escape(warning)}</li>" for warning in page.warnings)
        parts.append(f"<h2>Warnings</h2><ul>{listed}</ul>")
    for name, title in page.pictures.items():
        picture = base64.b64encode((out / f"{name}.png").read_bytes()).decode()
        parts.append(f"<h2>{html.escape(title)}</h2>")
        parts.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{picture}">')
    for name, recipe in page.recipes.items():
        shown = f"<summary>Recipe of {html.escape(name)}</summary><pre>{html.escape(recipe)}</pre>"
        parts.append(f"<details>{shown}</details>")
    body = "\n".join(parts)
    head = f'<meta charset="utf-8"><title>pal_ds report</title><style>{_STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _html_row(cells: list[str], tag: str) -> str:
    return f"<tr>{''.join(f'<{tag}>{html.escape(cell)}</{tag}>' for cell in cells)}</tr>"
