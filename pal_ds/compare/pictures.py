"""The pictures of a comparison: accuracy per method as bars, and new users against number of comparisons."""

from pathlib import Path
from typing import cast

import numpy as np
from matplotlib import pyplot as plt

from pal_ds.compare.page import all_rows, any_few_shot, has_folds
from pal_ds.compare.schema import Table
from pal_ds.eval.report_pictures import save_figure


def draw(table: Table, out: Path) -> None:
    """OUT/table.png and, where new users were fitted, OUT/few_shot.png; nothing where no method is finished."""
    if not table["methods"]:
        return
    draw_bars(table, out / "table.png")
    if any_few_shot(table):
        draw_curves(table, out / "few_shot.png")


def draw_bars(table: Table, path: Path) -> None:
    """Accuracy per method with a dot per seed; intervals over seeds (black), and over folds or within a seed (grey)."""
    methods = all_rows(table)
    spread = "ci95_over_folds" if has_folds(table) else "ci95_within_seed"
    figure, axes = plt.subplots(figsize=(6.5, 1.2 + 0.42 * len(methods)))
    for place, row in enumerate(methods.values()):
        accuracy = row["accuracy"]
        mean, by_seed = accuracy["mean"], accuracy["by_seed"]
        axes.barh(place, mean, height=0.7, color="tab:blue", alpha=0.6)
        for name, colour in ((spread, "0.5"), ("ci95_over_seeds", "black")):
            if (interval := accuracy.get(name)) is not None:
                axes.plot(interval, [place] * 2, color=colour, marker="|", linewidth=1)
        axes.scatter(by_seed, [place] * len(by_seed), color="black", s=8, zorder=3)
        if "bayes_accuracy" in row:
            axes.plot([row["bayes_accuracy"]["mean"]] * 2, [place - 0.35, place + 0.35], "k--")
    axes.axvline(0.5, color="0.5", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(methods)), list(methods))
    axes.invert_yaxis()
    grey = "over folds" if has_folds(table) else "within"
    label = f"accuracy on {table['split']}, seen users (95%: black over seeds, grey {grey})"
    axes.set(xlim=(0, 1), xlabel=label, title=table["suite"])
    save_figure(figure, path)


def draw_curves(table: Table, path: Path) -> None:
    """Accuracy on new users' pairs at evenly spaced ticks; the band is the interval over seeds, else within a seed."""
    figure, axes = plt.subplots(figsize=(6.5, 4))
    for method, row in all_rows(table).items():
        curve = row["few_shot"]
        if not curve:
            continue
        places = np.arange(len(curve))
        means = [point["accuracy"]["mean"] for point in curve]
        (line,) = axes.plot(places, means, marker="o", label=method)
        of_seeds = [point["accuracy"]["ci95_over_seeds"] for point in curve]
        bands = of_seeds if all(of_seeds) else [p["accuracy"]["ci95_within_seed"] for p in curve]
        if all(bands):
            low, high = np.transpose(cast(list, bands))
            axes.fill_between(places, low, high, color=line.get_color(), alpha=0.15)
        axes.set_xticks(places, [str(point["num_comparisons"]) for point in curve])
    labels = {"xlabel": "comparisons per new user", "ylabel": "accuracy on their test pairs"}
    axes.set(title=table["suite"], **labels)
    axes.legend(fontsize=8)
    save_figure(figure, path)
