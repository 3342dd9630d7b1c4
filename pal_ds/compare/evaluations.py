"""Reads what the runs of a suite left behind for its table: evaluations, few-shot curves, regressions from scratch."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from pal_ds.compare.suite import PlannedRun, Suite
from pal_ds.config.changes import changed_keys
from pal_ds.data.tables import PreparedData
from pal_ds.eval.results import read_user_figures
from pal_ds.eval.schema import EvaluationFigures, UserFigures

Evaluation = dict[str, Any]
"""Content of eval/NAME.json."""
Evaluations = dict[str, list[Evaluation]]
"""Evaluations of a method by fold and seed."""


def few_shot_of(planned: PlannedRun, suite: Suite) -> Evaluation | None:
    """Return the few-shot figures with the suite's values and draws at the last checkpoint, or None."""
    figures = evaluation_of(planned, "few_shot")
    if figures is None:
        return None
    settings = suite.settings
    wanted = [(count, settings.num_draws) for count in settings.few_shot]
    made = [(row["num_comparisons"], len(row["accuracy_by_seed"])) for row in figures["curve"]]
    return figures if made == wanted else None


def evaluation_of(planned: PlannedRun, name: str) -> Evaluation | None:
    """Return the figures eval/NAME.json of the run's last checkpoint, or None."""
    path = planned.run.eval / f"{name}.json"
    if not path.is_file():
        return None
    figures = json.loads(path.read_text())
    # An evaluation of an earlier checkpoint, or with users of another table, is not that of the finished run.
    own = figures["step"] in planned.run.complete_steps()[-1:] and not figures.get("adapted_users")
    return figures if own else None


def scratch_file(suite: Suite, fold: str) -> Path:
    """File of the figures of the regressions from scratch."""
    return suite.out / "scratch" / fold / f"{suite.settings.split}.json"


def scratch_of(suite: Suite, fold: str, data: PreparedData | None) -> Evaluation | None:
    """Return the figures of the regressions from scratch on these data, or None where a part is not there yet."""
    path = scratch_file(suite, fold)
    if not path.is_file():
        return None
    figures = json.loads(path.read_text())
    has_columns = {*figures["users_above"]} == {*map(str, suite.settings.users_above)}
    return figures if has_columns and (data is None or figures["data"] == data.hash) else None


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


def evaluations_of(
    suite: Suite, method: str, data: Mapping[str, PreparedData]
) -> Evaluations | None:
    """Return the figures of all runs of a method, or None where one is not evaluated yet.

    Each has "everyone", the accuracy of users whom the run knows and of strangers together, and "users_above", that of
    everyone with more comparisons than each number of the suite.
    """
    runs = {fold: suite.of(method, fold) for fold in suite.folds}
    if not all(is_evaluated(planned, suite) for of_fold in runs.values() for planned in of_fold):
        return None
    split, evaluations = suite.settings.split, {}
    for fold, of_fold in runs.items():
        above = users_above(suite, data[fold]) if fold in data else {}
        evaluations[fold] = [
            _with_everyone(
                evaluation_of(planned, split) or {}, planned.run.eval / f"{split}.json", above
            )
            for planned in of_fold
        ]
    return evaluations


def users_above(suite: Suite, data: PreparedData) -> dict[str, set[str]]:
    """Return the users with more comparisons in the data than each number of the suite."""
    numbers = suite.settings.users_above
    if not numbers:
        return {}
    counts = np.bincount(data.comparisons["user"], minlength=len(data.users))
    return {
        str(number): {data.users[row] for row in np.flatnonzero(counts > number)}
        for number in numbers
    }


def _with_everyone(figures: Evaluation, path: Path, above: dict[str, set[str]]) -> Evaluation:
    sides = [figures, figures.get("unknown_users") or {"pairs": 0, "users": {}}]
    total = sum(side["pairs"] for side in sides)
    everyone = figures["accuracy"]
    if sides[1]["pairs"]:
        everyone = sum(side["pairs"] * (side["accuracy"] or 0.0) for side in sides) / total
    figures = {**figures, "everyone": everyone}
    if above:
        if isinstance(figures["users"], str):
            remedy = "Evaluate again."
            sides[0] = cast(Evaluation, read_user_figures(path, EvaluationFigures, remedy))
        users = [entry for side in sides for entry in side["users"].items()]
        figures["users_above"] = {number: accuracy_of(users, ids) for number, ids in above.items()}
    return figures


def accuracy_of(users: Iterable[tuple[str, UserFigures]], ids: set[str]) -> float | None:
    """Return the accuracy over the pairs of some users; None where they have none.

    >>> users = [("a", {"pairs": 3, "accuracy": 1.0}), ("b", {"pairs": 1, "accuracy": 0.0})]
    >>> accuracy_of(users, {"a", "b"}), accuracy_of(users, {"c"})
    (0.75, None)
    """
    chosen = [figures for user, figures in users if user in ids]
    pairs = sum(figures["pairs"] for figures in chosen)
    return (
        sum(figures["pairs"] * figures["accuracy"] for figures in chosen) / pairs if pairs else None
    )
