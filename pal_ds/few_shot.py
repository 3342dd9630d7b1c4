"""How well new users are served after k comparisons: the curve that few-shot adaptation is judged by."""

from typing import Any

import numpy as np
import torch

from pal_ds.adapt import LogitPrior, fit_users
from pal_ds.adapt_run import few_per_user
from pal_ds.data.tables import PreparedData
from pal_ds.engine.dist import World
from pal_ds.errors import UserError
from pal_ds.evaluate import figures_of, population_mixture, predict, user_mixtures
from pal_ds.evaluate_run import reader_of
from pal_ds.heads.base import UserState
from pal_ds.restore import Restored, restore
from pal_ds.run_dir import RunDirectory, write_json


def evaluate_few_shot(
    run: RunDirectory,
    num_comparisons: list[int],
    num_draws: int,
    *,
    step: str = "latest",
    trust_checkpoint: bool = False,
    world: World | None = None,
) -> list[dict[str, Any]]:
    """`few_shot_curve` of a run, also written to eval/few_shot.json.

    Ranks of a `world` share texts and scoring out, and each fits all users; without one this process is alone.
    """
    world = world or World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    restored = restore(run, step, world.device, trust=trust_checkpoint)
    curve = few_shot_curve(restored, num_comparisons, world, seeds=tuple(range(num_draws)))

    def write() -> None:
        run.eval.mkdir(parents=True, exist_ok=True)
        write_json(run.eval / "few_shot.json", {"step": restored.step, "curve": curve})

    world.from_rank_zero(write)
    return curve


def few_shot_curve(
    restored: Restored, num_comparisons: list[int], world: World, *, seeds: tuple[int, ...] = (0,)
) -> list[dict[str, Any]]:
    """Accuracy of held-out users on `unseen_test` after fitting k pairs of `unseen_train`, one row per k.

    k = 0 scores with the population mixture; a head without users gives the same accuracy at every k. Rows:
    {"num_comparisons", "mean_comparisons", "accuracy", "accuracy_by_seed", "users", "test_pairs",
    "bayes_accuracy"?}; each seed is one draw of the k pairs, of which a user may have fewer (see the mean).

    Raises:
        UserError: no unseen user of the data can be fitted and tested.
    """
    data = restored.data
    fit_rows, test_rows = data.rows("unseen_train"), data.rows("unseen_test")
    user_of = data.comparisons["user"]
    owners = np.unique(user_of[test_rows])
    # Who has no pair to be tested on is not fitted either: the curve is about the users of `unseen_test`.
    fit_rows = fit_rows[np.isin(user_of[fit_rows], owners)]
    if len(fit_rows) == 0:
        raise UserError(
            f"{data.path}: no unseen user has pairs in both unseen_train and unseen_test."
        )
    table_rows = np.full(len(data.users), -1, np.int64)
    table_rows[owners] = np.arange(len(owners))
    everything = np.union1d(fit_rows, test_rows)
    reader = reader_of(restored, data, everything, table_rows, world, encode_ahead=True)
    population = population_mixture(user_mixtures(restored.model.head, restored.users)[:-1])
    prior, micro = LogitPrior.of(restored.users), restored.config.train.micro_batch_pairs
    draws = [(count, seed) for count in dict.fromkeys(num_comparisons) for seed in seeds]
    drawn = [_draw(data, fit_rows, count, seed) for count, seed in draws]
    # Each (k, seed, user) is fitted as a user of its own, all of them in one go.
    rows = np.concatenate(drawn)
    owner = np.concatenate([
        draw * len(owners) + table_rows[user_of[part]] for draw, part in enumerate(drawn)
    ])  # fmt: skip
    mixtures = population.repeat(len(draws) * len(owners), 1)
    if restored.parts.needs_users and len(rows):
        logits = fit_users(
            reader.model,
            restored.config.loss,
            reader.collator,
            rows,
            owner,
            len(mixtures),
            prior,
            world.device,
        )
        fitted = np.unique(owner)
        restored.model.head.eval()
        mixtures[fitted] = restored.model.head.mixture_weights(UserState(logits[fitted]))
    accuracies: dict[int, list[float]] = {}
    figures: dict[str, Any] = {}
    for (count, _), part in zip(draws, mixtures.split(len(owners)), strict=True):
        of_draw = torch.cat([part, population]).to(world.device)
        margins = predict(reader.model, reader.collator, test_rows, of_draw, micro, world)
        figures = figures_of(data, test_rows, margins)
        accuracies.setdefault(count, []).append(figures["accuracy"])
    return _rows(accuracies, drawn, len(owners), figures)


def _rows(
    accuracies: dict[int, list[float]],
    drawn: list[np.ndarray],
    num_users: int,
    figures: dict[str, Any],
) -> list[dict[str, Any]]:
    """One row per k from the accuracies and draws of all seeds; the best possible accuracy where the data know it."""
    facts = {"users": num_users, "test_pairs": figures["pairs"]}
    facts |= {name: figures[name] for name in ("bayes_accuracy",) if name in figures}
    num_seeds = len(drawn) // len(accuracies)
    return [
        {
            "num_comparisons": count,
            "mean_comparisons": len(drawn[index * num_seeds]) / num_users,
            "accuracy": float(np.mean(by_seed)),
            "accuracy_by_seed": by_seed,
            **facts,
        }
        for index, (count, by_seed) in enumerate(accuracies.items())
    ]


def _draw(data: PreparedData, rows: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most `count` comparisons of each user among `rows`."""
    return few_per_user(data, rows, count, seed) if count else rows[:0]
