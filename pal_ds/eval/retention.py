"""Loss of what a model knew: accuracy on general sets before and after it was trained further."""

import json
from typing import Any

import numpy as np

from pal_ds.errors import UserError
from pal_ds.io.boundary import reading
from pal_ds.runs.run_dir import RunDirectory

Figures = dict[str, Any]


def retention(before: RunDirectory, after: RunDirectory, names: list[str]) -> list[Figures]:
    """{"set", "pairs", "before", "after", "loss", "loss_ci95"} of each of the sets eval/NAME.json.

    The loss is accuracy before less accuracy after, over all users of the set, known to the run or not. Its 95%
    interval takes both accuracies as independent: wider than need be, as the same pairs are judged twice.

    Raises:
        UserError: a run that was not evaluated on a set, or two evaluations of different pairs.
    """
    return [_row(name, _accuracy(before, name), _accuracy(after, name)) for name in names]


def _row(name: str, before: tuple[int, float, float], after: tuple[int, float, float]) -> Figures:
    if before[0] != after[0]:
        raise UserError(
            f"eval/{name}.json: of {before[0]} pairs before and of {after[0]} after. Evaluate both runs on "
            "the same file."
        )
    loss, half = before[1] - after[1], 1.96 * float(np.hypot(before[2], after[2]))
    interval = [loss - half, loss + half]
    row = {"set": name, "pairs": before[0], "before": before[1], "after": after[1]}
    return {**row, "loss": loss, "loss_ci95": interval}


def _accuracy(run: RunDirectory, name: str) -> tuple[int, float, float]:
    """(pairs, accuracy, standard error) of one evaluation, users that the run knows and strangers together."""
    path = run.eval / f"{name}.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file. Run `evaluate --run_dir {run.path}` on this set.")
    with reading(path, "result of an evaluation", "Evaluate again."):
        figures = json.loads(path.read_text(encoding="utf-8"))
        parts = [part for part in (figures, figures["unknown_users"]) if part["pairs"]]
    if not parts:
        raise UserError(f"{path}: an evaluation of no pairs.")
    pairs = [part["pairs"] for part in parts]
    accuracies = [part["accuracy"] for part in parts]
    # From the interval, of which one end may be cut at 0 or 1.
    errors = [
        np.abs(np.subtract(part["accuracy_ci95"], part["accuracy"])).max() / 1.96 for part in parts
    ]
    share = np.asarray(pairs) / sum(pairs)
    return sum(pairs), float(share @ accuracies), float(np.linalg.norm(share * errors))


def table(rows: list[Figures]) -> str:
    """The rows in markdown."""
    lines = ["| set | pairs | before | after | loss (95% interval) |", "|---|---|---|---|---|"]
    for row in rows:
        low, high = row["loss_ci95"]
        accuracies = f"{row['before']:.3f} | {row['after']:.3f}"
        loss = f"{row['loss']:+.3f} ({low:+.3f} to {high:+.3f})"
        lines.append(f"| {row['set']} | {row['pairs']} | {accuracies} | {loss} |")
    return "\n".join(lines) + "\n"
