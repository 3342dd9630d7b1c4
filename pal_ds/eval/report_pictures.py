"""Pictures of a report: curves of all runs together, and a panel per run of its users, mixtures and calibration."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pal_ds.errors import writing
from pal_ds.eval.metrics import interval_of_share
from pal_ds.inference.load_run import OpenRun, trained_head
from pal_ds.inference.mixtures import user_mixtures
from pal_ds.io.boundary import reading
from pal_ds.runs.run_dir import RunDirectory

MOST_NAMES = 40
"""Users whose names a heat map shows; of more, so many evenly among them."""
MOST_ERROR_BARS = 200
"""Users up to whom each bar has its interval."""


def figures_of(run: RunDirectory, name: str) -> Any:
    """Return the content of eval/NAME.json, see `schema.py`; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    path = run.eval / f"{name}.json"
    if not path.is_file():
        return None
    needed = ("curve",) if name == "few_shot" else ("pairs", "accuracy", "accuracy_ci95", "users")
    with reading(path, "result of an evaluation", "Evaluate again."):
        figures = json.loads(path.read_text(encoding="utf-8"))
        for key in needed:
            figures[key]
    return figures


def draw_per_run(
    path: Path, runs: dict[str, RunDirectory], draw: Callable[[Axes, RunDirectory], bool]
) -> bool:
    """Draw one panel for each run that has something to show; return whether any had."""
    trial = plt.figure()
    shown = {name: run for name, run in runs.items() if draw(trial.add_subplot(), run)}
    plt.close(trial)
    if not shown:
        return False
    figure, panels = plt.subplots(1, len(shown), figsize=(4.6 * len(shown), 3.6), squeeze=False)
    for axes, (name, run) in zip(panels[0], shown.items(), strict=True):
        draw(axes, run)
        axes.set_title(name.replace("$", r"\$"))
    save_figure(figure, path)
    return True


def save_figure(figure: Figure, path: Path, shown: bool = True) -> None:
    """Write a picture, unless there is nothing to show, and forget it."""
    with warnings.catch_warnings():
        # Ids of users may hold signs that the font has not: a box stands for each, and nobody could mend it.
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        figure.tight_layout()
        if shown:
            with writing(path):
                figure.savefig(path, dpi=120)
    plt.close(figure)


def learning(path: Path, runs: dict[str, RunDirectory]) -> bool:
    """Draw all runs on shared axes: training loss, accuracy on dev, learning rate and norm of the gradient."""
    keys = {
        "loss": "training loss",
        "dev_accuracy": "accuracy on dev",
        "learning_rate": "learning rate",
        "grad_norm": "norm of the gradient",
    }
    rows = {name: run.read_metrics() for name, run in runs.items()}
    drawn = {
        key: {
            name: [(row["step"], row[key]) for row in of_run if row.get(key) is not None]
            for name, of_run in rows.items()
        }
        for key in keys
    }
    shown = [key for key in keys if any(drawn[key].values())]
    figure, panels = plt.subplots(
        1, max(1, len(shown)), figsize=(3.9 * len(shown) or 4, 3.4), squeeze=False
    )
    for axes, key in zip(panels[0], shown, strict=False):
        for name, points in drawn[key].items():
            marker = "o" if key == "dev_accuracy" else ""
            line = axes.plot(
                *np.asarray(points or np.empty((0, 2)), float).T, linewidth=1, label=name
            )
            line[0].set(marker=marker, markersize=3)
        axes.set(xlabel="update", ylabel=keys[key])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(runs) > 1 and shown:
        panels[0][0].legend(fontsize=7)
    save_figure(figure, path, bool(shown))
    return bool(shown)


def simplex(axes: Axes, opened: OpenRun | None, groups: dict[str, str | None]) -> bool:
    """Users at the weighted mean of the corners of a regular K-gon: exact for K = 3, a projection beyond."""
    if opened is None:
        return False
    num_prototypes = opened.users.num_prototypes
    head = opened.parts.head
    if num_prototypes < 2 or "logits" not in head.needs or not head.on_simplex:
        return False
    angles = np.pi / 2 + 2 * np.pi * np.arange(num_prototypes) / num_prototypes
    corners = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    places = user_mixtures(trained_head(opened), opened.users)[:-1].cpu().numpy() @ corners
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


def accuracy_per_user(axes: Axes, run: RunDirectory) -> bool:
    """Draw the accuracy of each user on test, worst first, with its interval."""
    figures = figures_of(run, "test")
    if not figures or not isinstance(figures["users"], dict) or not figures["users"]:
        return False
    users = sorted(figures["users"].values(), key=lambda user: user["accuracy"])
    accuracies, places = [user["accuracy"] for user in users], range(1, len(users) + 1)
    axes.bar(places, accuracies, width=0.9, color="tab:blue", alpha=0.7)
    if len(users) <= MOST_ERROR_BARS:
        error = _error_bars(accuracies, [user["pairs"] for user in users])
        axes.errorbar(places, accuracies, error, fmt="none", ecolor="0.3", elinewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.axhline(0.5, color="0.5", linewidth=1, linestyle=":")
    if (bayes := figures.get("bayes_accuracy")) is not None:
        axes.axhline(bayes, color="black", linewidth=1, linestyle="--", label="Bayes")
        axes.legend(fontsize=7, loc="lower right")
    axes.set(xlabel="users, worst first (bars: 95% interval)", ylabel="test accuracy", ylim=(0, 1))
    return True


def _error_bars(accuracies: list[float], num_pairs: list[int]) -> np.ndarray:
    """Wilson's 95% intervals as lengths below and above; fp64 [2, n]."""
    ends = [
        interval_of_share(accuracy, float(np.sqrt(accuracy * (1 - accuracy) / pairs)), pairs)
        for accuracy, pairs in zip(accuracies, num_pairs, strict=True)
    ]
    low, high = np.asarray(ends).T
    return np.abs(np.asarray([np.asarray(accuracies) - low, high - np.asarray(accuracies)]))


def accuracy_by_comparisons(axes: Axes, run: RunDirectory, counts: dict[str, int]) -> bool:
    """Draw the accuracy of each user against the number of comparisons that the run was trained on."""
    figures = figures_of(run, "test")
    if not figures or not isinstance(figures["users"], dict):
        return False
    known = {user: facts for user, facts in figures["users"].items() if counts.get(user)}
    if len({counts[user] for user in known}) < 2:
        return False  # all gave as many: there is nothing to see
    accuracies = [facts["accuracy"] for facts in known.values()]
    error = _error_bars(accuracies, [facts["pairs"] for facts in known.values()])
    places = [counts[user] for user in known]
    axes.errorbar(places, accuracies, error, fmt="o", markersize=3, elinewidth=0.5, alpha=0.7)
    axes.axhline(0.5, color="0.5", linewidth=1, linestyle=":")
    axes.set(xlabel="comparisons in training", ylabel="test accuracy", xscale="log", ylim=(0, 1))
    for set_formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
        set_formatter("{x:g}")
    return True


def mixtures(axes: Axes, opened: OpenRun | None) -> bool:
    """Draw the weight of each prototype for each user, by name; users of one prototype lie together."""
    if opened is None or "logits" not in opened.parts.head.needs or opened.users.num_prototypes < 2:
        return False
    weights = user_mixtures(trained_head(opened), opened.users)[:-1].cpu().numpy()
    order = np.lexsort((-weights.max(1), weights.argmax(1)))
    if len(order) > MOST_NAMES:
        # Evenly among them, so that every kind is there.
        order = order[np.linspace(0, len(order) - 1, MOST_NAMES).round().astype(int)]
    image = axes.imshow(weights[order], vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.figure.colorbar(image, ax=axes, label="weight")
    names = [opened.users.ids[row] for row in order]
    short = [name if len(name) <= 16 else f"{name[:15]}…" for name in names]
    # A $ would be read as the beginning of a formula.
    labels = [name.replace("$", r"\$") for name in short]
    axes.set_yticks(range(len(names)), labels, fontsize=5)
    axes.set_xticks(range(weights.shape[1]), [str(k + 1) for k in range(weights.shape[1])])
    axes.set_xlabel("prototype")
    return True


def reliability(axes: Axes, run: RunDirectory) -> bool:
    """Accuracy of the pairs of each bin of confidence; on the diagonal confidence is deserved."""
    figures = figures_of(run, "test")
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


def margins(axes: Axes, run: RunDirectory) -> bool:
    """Draw how far apart the two rewards of a pair lie; what is ranked wrongly lies left of 0."""
    figures = figures_of(run, "test")
    if not figures or not (counted := figures.get("margins")):
        return False
    edges = np.asarray(counted["edges"])
    places, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    colours = np.where(places > 0, "tab:blue", "tab:red")
    axes.bar(places, counted["pairs"], width=width, color=colours, alpha=0.7)
    axes.axvline(0, color="0.5", linewidth=1, linestyle=":")
    axes.set(xlabel="margin for the preferred response", ylabel="test pairs")
    return True


def prototypes(axes: Axes, run: RunDirectory) -> bool:
    """Mean weight of each prototype, over the distances between them where the head has points."""
    figures = figures_of(run, "test")
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


def new_users(path: Path, runs: dict[str, RunDirectory]) -> bool:
    """All runs in one picture; few-shot accuracy at 0, 1, 2, 4, ... comparisons on evenly spaced ticks.

    Dotted: each user's own regression from scratch on the states of the run of that colour.
    """
    figures_by_run = {name: figures_of(run, "few_shot") for name, run in runs.items()}
    curves = {name: figures["curve"] for name, figures in figures_by_run.items() if figures}
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
        # Runs on the same states have the same regressions, one line above the other.
        scratch = [row["accuracy"] for row in figures_by_run[name].get("scratch", ())]
        if scratch:
            axes.plot(places, scratch, color=line.get_color(), linewidth=1, linestyle=":")
        if "bayes_accuracy" in curve[-1]:
            axes.axhline(curve[-1]["bayes_accuracy"], color="black", linewidth=1, linestyle="--")
    axes.set(xlabel="comparisons per new user", ylabel="accuracy on their test pairs")
    if curves:
        axes.legend(fontsize=8)
    save_figure(figure, path, bool(curves))
    return bool(curves)
