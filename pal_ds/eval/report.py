"""Pictures and a page for one run, or several side by side.

Reads what training and evaluation left in the run directories (metrics.jsonl, eval/test.json, eval/few_shot.json) and
leaves out the pictures whose data are not there.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pal_ds.engine.checkpoint.verify import refuse_strangers_run
from pal_ds.inference.load_run import OpenRun, open_run
from pal_ds.inference.mixtures import user_mixtures
from pal_ds.io.files import write_atomically
from pal_ds.runs.run_dir import RunDirectory

PICTURES = {
    "learning": "Learning curve",
    "simplex": "Users in the simplex",
    "users": "Accuracy per user",
    "reliability": "Stated confidence against accuracy",
    "prototypes": "Prototypes: share of users, distances",
    "new_users": "New users against number of comparisons",
}


def write_report(
    runs: dict[str, RunDirectory],
    out: Path,
    groups: dict[str, str | None] | None = None,
    *,
    trust: bool = False,
    trust_code: bool = False,
) -> Path:
    """Writes OUT/report.md and its PNGs; `groups` colours users by a known group. Returns the page's path.

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
    out.mkdir(parents=True, exist_ok=True)
    panels: dict[str, Callable[[Axes, RunDirectory], bool]] = {
        "learning": _learning_curve,
        "simplex": lambda axes, run: _simplex(axes, opened.get(run.path), groups or {}),
        "users": _accuracy_per_user,
        "reliability": _reliability,
        "prototypes": _prototypes,
    }
    drawn = {name: _draw(out / f"{name}.png", runs, draw) for name, draw in panels.items()}
    drawn["new_users"] = _new_users(out / "new_users.png", runs)
    lines = ["# Report", "", *_table(runs), "", *_warnings(runs)]
    for name, title in PICTURES.items():
        if drawn[name]:
            lines += [f"## {title}", "", f"![{title}]({name}.png)", ""]
    write_atomically(out / "report.md", "\n".join(lines))
    return out / "report.md"


def _figures(run: RunDirectory, name: str) -> Any:
    """Content of eval/NAME.json, see `schema.py`; None where there is none."""
    path = run.eval / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _table(runs: dict[str, RunDirectory]) -> list[str]:
    lines = [
        "| run | test pairs | accuracy (95% interval) | Bayes | worst tenth of users | controversial | ECE | Brier |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in runs.items():
        figures = _figures(run, "test")
        if figures and figures["accuracy_ci95"] is not None:
            low, high = figures["accuracy_ci95"]
            # An evaluation of an earlier version lacks the newer figures.
            disputed, controversial = figures.get("controversial"), ""
            if disputed and disputed["pairs"]:
                controversial = f"{_number(disputed['accuracy'])} of {disputed['pairs']}"
            bayes, brier = figures.get("bayes_accuracy"), figures.get("brier")
            worst, ece = figures["worst_decile_user_accuracy"], figures["ece"]
            lines.append(
                f"| {name} | {figures['pairs']} | {figures['accuracy']:.3f} ({low:.3f}-{high:.3f}) | {_number(bayes)} "
                f"| {_number(worst)} | {controversial} | {_number(ece)} | {_number(brier)} |"
            )
        else:
            lines.append(f"| {name} | no eval/test.json: run `evaluate` first | | | | | | |")
    return lines


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _warnings(runs: dict[str, RunDirectory]) -> list[str]:
    """A section with what the evaluations of each run warn of; nothing where none does."""
    warnings = [
        f"- {name}, eval/{file}.json: {warning}"
        for name, run in runs.items()
        for file in ("test", "few_shot")
        for warning in (_figures(run, file) or {}).get("warnings", [])
    ]
    return ["## Warnings", "", *warnings, ""] if warnings else []


def _draw(
    path: Path, runs: dict[str, RunDirectory], draw: Callable[[Axes, RunDirectory], bool]
) -> bool:
    """Draw one panel per run; return whether any run had something to show."""
    figure, panels = plt.subplots(1, len(runs), figsize=(4.6 * len(runs), 3.6), squeeze=False)
    shown = False
    for axes, (name, run) in zip(panels[0], runs.items(), strict=True):
        has_content = draw(axes, run)
        axes.set_title(name)
        axes.set_axis_on() if has_content else axes.set_axis_off()
        shown = shown or has_content
    save_figure(figure, path, shown)
    return shown


def save_figure(figure: Figure, path: Path, shown: bool = True) -> None:
    """Write a picture, unless there is nothing to show, and forget it."""
    figure.tight_layout()
    if shown:
        figure.savefig(path, dpi=120)
    plt.close(figure)


def _learning_curve(axes: Axes, run: RunDirectory) -> bool:
    rows = run.read_metrics()
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    dev = [(row["step"], row["dev_accuracy"]) for row in rows if "dev_accuracy" in row]
    if not train:
        return False
    axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1)
    axes.set_xlabel("update")
    axes.set_ylabel("training loss", color="tab:blue")
    if dev:
        right = axes.twinx()
        right.plot(*zip(*dev, strict=True), color="tab:orange", marker="o", markersize=3)
        right.set_ylabel("dev accuracy", color="tab:orange")
    return True


def _simplex(axes: Axes, opened: OpenRun | None, groups: dict[str, str | None]) -> bool:
    """Users at the weighted mean of the corners of a regular K-gon: exact for K = 3, a projection beyond."""
    if opened is None:
        return False
    num_prototypes = opened.users.num_prototypes
    if num_prototypes < 2 or "logits" not in opened.parts.head.needs:
        return False
    angles = np.pi / 2 + 2 * np.pi * np.arange(num_prototypes) / num_prototypes
    corners = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    places = user_mixtures(opened.parts.head, opened.users)[:-1].cpu().numpy() @ corners
    outline = np.concatenate([corners, corners[:1]])
    axes.plot(outline[:, 0], outline[:, 1], color="0.7", linewidth=1)
    for index, (x, y) in enumerate(corners):
        axes.annotate(f"{index + 1}", (1.14 * x, 1.14 * y), ha="center", va="center", color="0.4")
    names = np.asarray([groups.get(user) or "mixed" for user in opened.users.ids])
    for group in sorted(set(names), key=lambda name: (name == "mixed", name)):
        chosen = places[names == group]
        colour = "0.6" if group == "mixed" else None
        axes.scatter(chosen[:, 0], chosen[:, 1], s=18, label=group, alpha=0.8, color=colour)
    if set(names) != {"mixed"}:
        # Below the panel: inside, it would hide the users of some corner.
        axes.legend(
            fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3, frameon=False
        )
    axes.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal", xticks=[], yticks=[])
    return True


def _accuracy_per_user(axes: Axes, run: RunDirectory) -> bool:
    figures = _figures(run, "test")
    if not figures or not isinstance(figures["users"], dict) or not figures["users"]:
        return False
    accuracies = np.sort([user["accuracy"] for user in figures["users"].values()])
    axes.bar(np.arange(len(accuracies)), accuracies, width=1.0, color="tab:blue", alpha=0.7)
    axes.axhline(0.5, color="0.5", linewidth=1, linestyle=":")
    if (bayes := figures.get("bayes_accuracy")) is not None:
        axes.axhline(bayes, color="black", linewidth=1, linestyle="--", label="Bayes")
        axes.legend(fontsize=7, loc="lower right")
    axes.set(xlabel="users, worst first", ylabel="test accuracy", ylim=(0, 1))
    return True


def _reliability(axes: Axes, run: RunDirectory) -> bool:
    """Accuracy of the pairs of each bin of confidence; on the diagonal confidence is deserved."""
    figures = _figures(run, "test")
    if not figures or not (bins := figures.get("reliability")):
        return False
    stated, right = ([row[key] for row in bins] for key in ("confidence", "accuracy"))
    share = np.asarray([row["pairs"] for row in bins]) / figures["pairs"]
    axes.plot([0.5, 1], [0.5, 1], color="0.5", linewidth=1, linestyle=":")
    axes.plot(stated, right, color="tab:blue", linewidth=1)
    axes.scatter(stated, right, s=400 * share + 4, color="tab:blue", alpha=0.7)
    label = f"ECE {figures['ece']:.3f}, Brier {figures['brier']:.3f}"
    axes.annotate(label, (0.04, 0.92), xycoords="axes fraction", fontsize=8)
    axes.set(xlabel="stated confidence (area: share of pairs)", ylabel="accuracy")
    axes.set(xlim=(0.48, 1.02), ylim=(-0.05, 1.05))
    return True


def _prototypes(axes: Axes, run: RunDirectory) -> bool:
    """Mean weight of each prototype, over the distances between them where the head has points."""
    figures = _figures(run, "test")
    diagnostics = figures.get("diagnostics") if figures else None
    # A head that makes points from comparisons has latent units and no prototypes.
    if not diagnostics or not diagnostics.get("prototype_shares"):
        return False
    shares, distances = diagnostics["prototype_shares"], diagnostics["prototype_distances"]
    ticks = range(len(shares))
    labels = [f"{k + 1}\n{share:.0%}" for k, share in enumerate(shares)]
    if distances is None:
        axes.bar(ticks, shares, color="tab:blue", alpha=0.7)
        axes.set_ylabel("mean weight")
    else:
        image = axes.imshow(distances, cmap="viridis")
        axes.figure.colorbar(image, ax=axes, label="distance")
        axes.set_yticks(ticks, [str(k + 1) for k in ticks])
    axes.set_xticks(ticks, labels, fontsize=8)
    used, mixed = (diagnostics[f"effective_prototypes{of}"] for of in ("", "_per_user"))
    axes.set_xlabel(f"{used:.1f} in use, {mixed:.1f} per user (exp entropy)")
    return True


def _new_users(path: Path, runs: dict[str, RunDirectory]) -> bool:
    """All runs in one picture; few-shot accuracy at 0, 1, 2, 4, ... comparisons on evenly spaced ticks."""
    curves = {name: _figures(run, "few_shot") for name, run in runs.items()}
    curves = {name: curve["curve"] for name, curve in curves.items() if curve}
    figure, axes = plt.subplots(figsize=(5.5, 3.8))
    counts = sorted({row["num_comparisons"] for curve in curves.values() for row in curve})
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    for name, curve in curves.items():
        places = [counts.index(row["num_comparisons"]) for row in curve]
        accuracies = [row["accuracy"] for row in curve]
        (line,) = axes.plot(places, accuracies, marker="o", label=name)
        # A curve of an earlier version has no intervals.
        if all("accuracy_ci95" in row for row in curve):
            low, high = zip(*(row["accuracy_ci95"] for row in curve), strict=True)
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        if "bayes_accuracy" in curve[-1]:
            axes.axhline(curve[-1]["bayes_accuracy"], color="black", linewidth=1, linestyle="--")
    axes.set(xlabel="comparisons per new user", ylabel="accuracy on their test pairs")
    if curves:
        axes.legend(fontsize=8)
    save_figure(figure, path, bool(curves))
    return bool(curves)
