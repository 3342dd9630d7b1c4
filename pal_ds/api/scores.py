"""Scores of texts from Python, and questions for users."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pal_ds.api.run import AnyRun, Records, Run, for_people, path_or_list, run_of
from pal_ds.io.files import at_home
from pal_ds.runs.run_dir import RunDirectory

if TYPE_CHECKING:
    from pal_ds.inference.score_texts import Scorer
    from pal_ds.inference.text_rows import Row


def score(
    model: AnyRun,
    texts: Records,
    *,
    user: str | None = None,
    mixture: Sequence[float] | None = None,
    group: str | None = None,
    users: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> list[float]:
    """Scalar rewards of texts, by a run or by a folder that `consolidate` wrote; in one process.

    Args:
        model: the run or the folder.
        texts: records of `prompt` and `response` (strings or chat messages), or of `text`; one with a `user_id` is
            scored for that user.
        user: id of a user of the run, or of `users`, for all texts; without any of these three, the average user for
            texts that name none.
        mixture: a point of K numbers in place of a user.
        group: a group of the run's data, for a head that asks for it.
        users: new users that `adapt` fitted, among whom `user` is looked up first.
        trust_remote_code: run the code that lies in an exported folder; see `load_reward_model`.

    Returns:
        One reward for each text, in order; NaN, with a warning, for a response longer than the model's max_length.

    Raises:
        UserError: no such model or user, two of user, mixture and group, or a text that cannot be read.
    """
    where = run_of(model)
    whom = {"user": user, "mixture": mixture, "group": group, "users": users}
    with for_people():
        scorer, rows = _scorer_of(where, texts, whom, trust_remote_code)
        return [math.nan if score is None else score for score in scorer.score_all(rows)]


def score_with_std(
    model: AnyRun,
    texts: Records,
    users: str | os.PathLike[str] | None = None,
    *,
    user: str | None = None,
    pessimism: float = 0.0,
    trust_remote_code: bool = False,
) -> tuple[list[float], list[float]]:
    """Scalar rewards of texts, and the standard deviation of each under its user's posterior.

    Args:
        model: a run, or a folder that `consolidate` wrote.
        texts: as for `score`; each names its user, unless `user` does so for all.
        users: new users that `adapt` fitted; unset, `model` is an export of one of them.
        user: one of these, for all texts.
        pessimism: standard deviations to take off each reward.
        trust_remote_code: run the code that lies in an exported folder.

    Returns:
        (rewards, standard deviations), both in order and in the units of rewards; NaN, with a warning, for a response
        longer than the model's max_length.

    Raises:
        UserError: as for `score`, or nothing says how sure a user is.
    """
    from pal_ds.inference.sure_scores import with_posterior

    where = run_of(model)
    with for_people():
        whom = {"user": user, "users": users}
        scorer, rows = _scorer_of(where, texts, whom, trust_remote_code)
        folder = None if users is None else at_home(users)
        scorer = with_posterior(scorer, folder, user, pessimism=pessimism)
        scores = scorer.score_all_with_std(rows)
    rewards = [math.nan if score is None else score.score for score in scores]
    stds = [math.nan if score is None or score.std is None else score.std for score in scores]
    return rewards, stds


def _scorer_of(
    where: Run, texts: Records, whom: Mapping[str, Any], trust_remote_code: bool
) -> tuple["Scorer", list["Row"]]:
    """Open what scores, and read what is scored; `whom` as `score` takes it."""
    from pal_ds.export.card import FACTS_NAME
    from pal_ds.inference.text_rows import read_rows, rows_of
    from pal_ds.reward_models import Whom, scorer_of_export, scorer_of_run

    users = whom.get("users")
    named = {name: value for name, value in whom.items() if name != "users"}
    of_whom = Whom(**named, users_dir=None if users is None else at_home(users))
    of_caller = path_or_list(texts, "texts")
    rows = read_rows(of_caller) if isinstance(of_caller, Path) else rows_of(of_caller)
    if (where.path / FACTS_NAME).is_file():
        scorer = scorer_of_export(where.path, of_whom, trust_remote_code=trust_remote_code)
    else:
        scorer = scorer_of_run(RunDirectory(where.path), of_whom, str(where.step), **where.leave)
    return scorer, rows


def ask(
    run: AnyRun,
    candidates: Records,
    users: str | os.PathLike[str],
    out: str | os.PathLike[str],
    num: int = 10,
    *,
    strategy: Literal["random", "d_optimal", "bald", "thompson"] = "bald",
    seed: int = 0,
) -> list[dict[str, object]]:
    """Choose for each fitted user the comparisons, out of a pool, whose answers would tell most.

    Args:
        run: what was trained.
        candidates: pairs, or lists of responses to one prompt; a `user_id` restricts one to that user, and answers are
            not read.
        users: new users that `adapt` fitted.
        out: JSON Lines to write.
        num: comparisons for each user, or all of who has fewer candidates, with a warning.
        strategy: `d_optimal` and `bald` ask for what tells most of the user's point, `thompson` for what tells which
            response is best.
        seed: of `random` and `thompson`.

    Returns:
        The lines of `out`: each candidate with `user_id`, `gain` and `rank`; `y` is to be added.

    Raises:
        UserError: candidates that cannot be read, or none for any of the users; users without a posterior.
    """
    from pal_ds.adaptation.ask import AskOptions, ask_run
    from pal_ds.data.sources import Jsonl
    from pal_ds.data.sources.base import read_lines
    from pal_ds.data.sources.given import GivenRecords

    where, file = run_of(run), at_home(out)
    with for_people():
        given = path_or_list(candidates, "candidates")
        pool = Jsonl(str(given)) if isinstance(given, Path) else GivenRecords(given)
        options = AskOptions(
            candidates=pool,
            users=at_home(users),
            num=num,
            strategy=strategy,
            step=str(where.step),
            seed=seed,
            trust_checkpoint=where.trust_checkpoint,
            trust_code=where.trust_code,
        )
        ask_run(RunDirectory(where.path), file, options)
        return [dict(line) for _, line in read_lines(file)]
