"""Few-shot curve: accuracy for new users after k comparisons, by which few-shot adaptation is judged."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from pal_ds.adaptation.active import (
    NewUsersPool,
    against_random,
    refuse_strategies,
    strategy_lines,
)
from pal_ds.adaptation.curve_scores import right_of_draws
from pal_ds.adaptation.few_shot_scratch import (
    beside,
    length_baseline,
    scratch_lines,
    scratch_right,
)
from pal_ds.adaptation.fit import Solver, refuse_solver
from pal_ds.adaptation.new_users import few_per_user
from pal_ds.adaptation.strategies import Strategy
from pal_ds.config.run_config import check_range
from pal_ds.data.tables import PreparedData, preferences
from pal_ds.data.verification import verify_content
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.eval.figures import scored_pairs
from pal_ds.eval.metrics import (
    MIN_CLUSTERS,
    clustered_standard_error,
    interval_of_share,
    mean_figures,
)
from pal_ds.eval.results import write_figures
from pal_ds.eval.sanity_checks import ONE_PROMPT, ScoredPairs, unseen_above_seen
from pal_ds.eval.schema import CurvePoint, FewShotFigures, ScratchPoint, StrategyFigures
from pal_ds.inference.load_run import OpenRun, open_run, with_weights
from pal_ds.inference.readers import own_margins, reader_of
from pal_ds.runs.run_dir import RunDirectory


class Curve(NamedTuple):
    """Accuracy of held-out users against the number of comparisons they gave."""

    rows: list[CurvePoint]
    """A point per k, see `few_shot_curve`."""
    right: np.ndarray
    """Correctness of each test pair, mean over draws; fp64 [k, n]."""
    prompts: np.ndarray
    """Prompt of each test pair, int64 [n]."""
    users: np.ndarray
    """User of each test pair, int64 [n]."""
    scratch: Sequence[ScratchPoint] = ()
    """The same draws and test pairs by each user's own regression, see `eval/scratch_users.py`."""

    @property
    def clusterings(self) -> list[np.ndarray]:
        """Users and prompts, whose pairs stand or fall together; of one prompt alone, users alone. int64 [n] each."""
        has_prompts = len(np.unique(self.prompts)) > 1
        return [self.users, self.prompts] if has_prompts else [self.users]

    @property
    def num_clusters(self) -> int:
        """Number of prompts, or of users where there is one prompt."""
        return len(np.unique(self.clusterings[-1]))


def evaluate_few_shot(
    run: RunDirectory | OpenRun,
    num_comparisons: list[int],
    num_draws: int,
    *,
    solver: Solver = "auto",
    strategies: tuple[Strategy, ...] = ("random",),
    world: World | None = None,
) -> FewShotFigures:
    """Measure the few-shot curve, write eval/few_shot.json and return its content.

    Of a run directory the last checkpoint is taken; an open run names its own. `solver` is that of `fit_users`.

    {"step", "curve": rows of `few_shot_curve`, "monotone_within_ci95": see `is_monotone`, "seen": {"pairs", "accuracy",
    "accuracy_ci95"} of the run's own users on `test`, "scratch": the same curve of each user's own regression, with the
    run's gain over it, "warnings": where the last k is served better than they are}.
    Ranks of a `world` share texts and scoring out, and each fits all users; without one this process is alone.
    "strategies" has the curves of those of `strategies` that are not random, beside the random one; see `active.py`.

    Raises:
        UserError: no k or no draw, or a negative k; a strategy for users without posteriors; or see `few_shot_curve`.
    """
    sound = bool(num_comparisons) and min(num_comparisons) >= 0
    check_range("num_comparisons", num_comparisons, sound, "numbers of 0 or more, at least one")
    check_range("num_draws", num_draws, num_draws >= 1, "at least 1")
    world = world or World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    opened = open_run(run) if isinstance(run, RunDirectory) else run
    if solver != "auto" and not opened.parts.head.has_points:
        raise UserError(f"--solver {solver}: this run's head has no users to fit. Leave it out.")
    refuse_solver(solver, opened.parts.head, opened.config.loss)
    refuse_strategies(opened, strategies)
    _, test_rows = _fit_and_test_rows(opened.data)
    restored = world.on_every_rank(lambda: with_weights(opened, world.device))
    verify_content(restored.data.path, restored.data.info, world)
    seeds = tuple(range(num_draws))
    names: tuple[Strategy, ...] = tuple(dict.fromkeys(("random", *strategies)))
    curves = few_shot_curves(
        restored, num_comparisons, world, seeds=seeds, solver=solver, strategies=names
    )
    curve = curves.pop("random")
    seen = _seen(restored, world)
    figures: FewShotFigures = {
        "step": restored.step,
        "curve": curve.rows,
        "monotone_within_ci95": is_monotone(curve),
        "seen": mean_figures(*seen),
        "scratch": [*curve.scratch],
        "length_baseline_accuracy": length_baseline(restored.data, test_rows),
        "warnings": unseen_above_seen(seen, ScoredPairs(curve.right[-1], curve.prompts)),
    }
    if len(curve.clusterings) == 1:
        figures["warnings"].append(ONE_PROMPT)
    if curves:
        figures["strategies"] = _beside_random(curves, curve)
    world.from_rank_zero(lambda: write_figures(opened.run, "few_shot", figures))
    return figures


def _beside_random(curves: Mapping[Strategy, Curve], random: Curve) -> dict[str, StrategyFigures]:
    """Each strategy's curve beside that of random choices."""
    error = partial(_standard_error, curve=random)
    # Of fewer users or prompts the spread says nothing.
    known = random.num_clusters >= MIN_CLUSTERS
    return {
        name: against_random(own.rows, own.right, random.right, error if known else None)
        for name, own in curves.items()
    }


def few_shot_lines(figures: FewShotFigures) -> list[str]:
    """Lines for people."""
    rows, seen = figures["curve"], figures["seen"]
    lines = [f"{rows[0]['users']} users, {rows[0]['test_pairs']} test pairs"]
    for row in rows:
        low, high = row["accuracy_ci95"]
        lines.append(
            f"{row['num_comparisons']:4d} comparisons (mean {row['mean_comparisons']:.1f}): "
            f"accuracy {row['accuracy']:.4f} [{low:.4f}, {high:.4f}]"
        )
    lines += scratch_lines(figures)
    for name, own in figures.get("strategies", {}).items():
        lines += strategy_lines(name, own)
    if seen["pairs"]:
        lines.append(f"seen users: accuracy {seen['accuracy']:.4f}")
    if not figures["monotone_within_ci95"]:
        lines.append("accuracy falls with more comparisons by more than its 95% interval")
    return lines + [f"warning: {warning}" for warning in figures["warnings"]]


def _seen(restored: OpenRun, world: World) -> ScoredPairs:
    """The run's own users on `test`."""
    data, rows = restored.data, restored.data.rows("test")
    if len(rows) == 0:
        return ScoredPairs(np.empty(0), np.empty(0, np.int64))
    return scored_pairs(data, rows, own_margins(restored, rows, world))


def is_monotone(curve: Curve) -> bool:
    """Return whether no k is worse than a smaller one by more than the 95% interval of the difference.

    The same test pairs are judged at both, so the interval is that of the difference per pair. True where too few
    prompts were tested to say otherwise.
    """
    if curve.num_clusters < MIN_CLUSTERS:
        return True
    order = np.argsort([row["num_comparisons"] for row in curve.rows], kind="stable")
    for place, less in enumerate(order):
        for more in order[place + 1 :]:
            loss = curve.right[less] - curve.right[more]
            if loss.mean() > 1.96 * _standard_error(loss, curve):
                return False
    return True


def _standard_error(values: np.ndarray, curve: Curve) -> float:
    """Compute the standard error of a mean over test pairs, clustered by user or by prompt, whichever is wider."""
    return max(clustered_standard_error(values, clusters) for clusters in curve.clusterings)


def few_shot_curve(
    restored: OpenRun,
    num_comparisons: list[int],
    world: World,
    *,
    seeds: tuple[int, ...] = (0,),
    solver: Solver = "auto",
) -> Curve:
    """Accuracy of held-out users on `unseen_test` after fitting k pairs of `unseen_train`, one row per k.

    k = 0 scores with the population mixture; a head without users gives the same accuracy at every k. Rows:
    {"num_comparisons", "mean_comparisons", "accuracy", "accuracy_ci95", "accuracy_by_seed", "users", "test_pairs",
    "bayes_accuracy"?}; each seed is one draw of the k pairs, of which a user may have fewer (see the mean). The
    interval is over users, prompts and draws: of the mean over draws per test pair, clustered by user or by prompt,
    whichever is wider; by user where all are of one prompt.

    Raises:
        UserError: no unseen user of the data can be fitted and tested.
    """
    return few_shot_curves(restored, num_comparisons, world, seeds=seeds, solver=solver)["random"]


def few_shot_curves(
    restored: OpenRun,
    num_comparisons: list[int],
    world: World,
    *,
    seeds: tuple[int, ...] = (0,),
    solver: Solver = "auto",
    strategies: tuple[Strategy, ...] = ("random",),
) -> dict[Strategy, Curve]:
    """`few_shot_curve` for each strategy by which the k comparisons are chosen, on the same test pairs.

    Raises:
        UserError: no unseen user of the data can be fitted and tested.
    """
    data = restored.data
    fit_rows, test_rows = _fit_and_test_rows(data)
    user_of = data.comparisons["user"]
    owners = np.unique(user_of[test_rows])
    table_rows = np.full(len(data.users), -1, np.int64)
    table_rows[owners] = np.arange(len(owners))
    everything = np.union1d(fit_rows, test_rows)
    reader = reader_of(restored, data, everything, table_rows, world, encode_ahead=True)
    pool = NewUsersPool(restored, reader, fit_rows, len(owners), solver)
    draws = [(count, seed) for count in dict.fromkeys(num_comparisons) for seed in seeds]
    shape = -1, len(seeds), len(test_rows)
    curves: dict[Strategy, Curve] = {}
    for strategy in strategies:
        if strategy == "random":
            drawn = [few_per_user(data, fit_rows, count, seed) for count, seed in draws]
        else:
            drawn = pool.drawn(strategy, draws)
        right = right_of_draws(pool, test_rows, drawn, world)
        curve = _curve(data, test_rows, right.reshape(shape), draws, drawn)
        if strategy == "random":
            from_scratch = scratch_right(pool, test_rows, drawn).reshape(shape)
            scratch = _curve(data, test_rows, from_scratch, draws, drawn)
            gains = curve.right - scratch.right
            points = beside(scratch.rows, gains, curve.users, curve.prompts)
            curve = curve._replace(scratch=points)
        curves[strategy] = curve
    return curves


def _fit_and_test_rows(data: PreparedData) -> tuple[np.ndarray, np.ndarray]:
    """Return the comparisons to fit and to test held-out users by. Raises UserError where there are none."""
    fit_rows, test_rows = data.rows("unseen_train"), data.rows("unseen_test")
    test_rows = test_rows[preferences(data.comparisons[test_rows]) != 0]
    user_of = data.comparisons["user"]
    # Who has no pair to be tested on is not fitted either: the curve is about the users of `unseen_test`.
    fit_rows = fit_rows[np.isin(user_of[fit_rows], user_of[test_rows])]
    if len(fit_rows) == 0:
        raise UserError(
            f"{data.path}: no unseen user has pairs in both unseen_train and unseen_test. Prepare with "
            "data.unseen_user_fraction above 0, which holds users out whole, and train on these data."
        )
    return fit_rows, test_rows


def _curve(
    data: PreparedData,
    test_rows: np.ndarray,
    right: np.ndarray,
    draws: list[tuple[int, int]],
    drawn: list[np.ndarray],
) -> Curve:
    """Make the curve from `right` [k, draws, n], the (k, seed) of each draw and what was drawn."""
    table = data.comparisons[test_rows]
    curve = Curve([], right.mean(1), data.response_prompt[table["a"]], table["user"])
    num_users, num_seeds = len(np.unique(table["user"])), right.shape[1]
    probability = table["probability"].astype(float)
    for index, of_count in enumerate(right):
        first, mean = index * num_seeds, curve.right[index].mean()
        error = _standard_error(curve.right[index], curve)
        point: CurvePoint = {
            "num_comparisons": draws[first][0],
            "mean_comparisons": len(drawn[first]) / num_users,
            "accuracy": float(of_count.mean()),
            "accuracy_ci95": list(interval_of_share(float(mean), error, curve.num_clusters)),
            "accuracy_by_seed": of_count.mean(1).tolist(),
            "users": num_users,
            "test_pairs": len(test_rows),
        }
        if np.isfinite(probability).all():
            point["bayes_accuracy"] = float(np.maximum(probability, 1 - probability).mean())
        curve.rows.append(point)
    return curve
