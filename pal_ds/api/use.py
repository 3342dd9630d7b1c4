"""Uses of a trained run from Python: evaluations, new users, exported models."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pal_ds.api.run import AnyRun, Records, as_pairs, for_people, run_of
from pal_ds.errors import UserError
from pal_ds.io.files import at_home
from pal_ds.runs.run_dir import RunDirectory


def evaluate(
    run: AnyRun,
    *,
    split: str | None = None,
    data: Records | None = None,
    name: str | None = None,
    users: str | os.PathLike[str] | None = None,
    best_of_n: bool = False,
    num_example_pairs: int | None = None,
) -> dict[str, Any]:
    """Accuracy per user, exact at any number of ranks; also written to RUN/eval/NAME.json.

    Args:
        run: what to evaluate.
        split: split of the run's data: `test`, `dev`, `train`, `unseen_train`, ...; unset, and without `data`, `test`.
        data: comparisons in place of a split.
        name: of the result; unset, the split, the file's stem, or `records` for comparisons in memory.
        users: new users that `adapt` fitted, beside or in place of the run's own.
        best_of_n: choosing among candidates instead: lines of `responses` and `scores`.
        num_example_pairs: comparisons that each prototype scores for the report's examples; unset 200, 0 none.

    Returns:
        The figures of eval/NAME.json: `pairs`, `accuracy`, `accuracy_ci95`, `ece`, `users` by id, ...

    Raises:
        UserError: no such run, step or split, or comparisons that cannot be read.
    """
    from pal_ds.data.sources import Source
    from pal_ds.eval.best_of_n import rank_set
    from pal_ds.eval.evaluate import evaluate_set, restored_by_ranks
    from pal_ds.eval.results import (
        NAME_PREFIX,
        SPLIT,
        eval_requests,
        number_of_examples,
        source_request,
    )

    where, table = run_of(run), None if users is None else at_home(users)
    if split is not None and data is not None:
        raise UserError("evaluate: give `split`, or `data` in place of a split, not both.")
    with for_people():
        pairs, prefix = as_pairs(data, "data"), NAME_PREFIX if best_of_n else ""
        if isinstance(pairs, Source):
            request = source_request(pairs, name or f"{prefix}records", prefix)
        else:
            files = [] if pairs is None else [pairs]
            (request,) = eval_requests(split or SPLIT, files, name, prefix)
        examples = number_of_examples(num_example_pairs, best_of_n=best_of_n)
        request = request._replace(num_example_pairs=examples)
        opening = restored_by_ranks(RunDirectory(where.path), where.step, table, **where.leave)
        with opening as (world, run_, known):
            measure = rank_set if best_of_n else evaluate_set
            return dict(measure(run_, known, request, world))


@dataclass(frozen=True)
class AdaptedUsers:
    """New users of a run: `evaluate`, `score` and `consolidate` take it, or its path, as `users`."""

    path: Path
    """Folder of users.safetensors, users.arrow and report.json."""
    report: dict[str, Any]
    """Pairs and accuracy of the fit on them (optimistic), over all and per user."""

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def mixtures(self) -> dict[str, list[float]]:
        """Each user's point s_u, K numbers, by user id."""
        return {user: facts["mixture"] for user, facts in self.report["users"].items()}


def few_shot(
    run: AnyRun,
    num_comparisons: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 50),
    num_draws: int = 20,
    *,
    solver: Literal["auto", "newton", "adam", "reference"] = "auto",
    strategies: Sequence[Literal["random", "d_optimal", "bald", "thompson"]] = ("random",),
) -> dict[str, Any]:
    """Accuracy of held-out users after k comparisons each; also written to RUN/eval/few_shot.json.

    Args:
        run: a run whose data hold users out (`data.unseen_user_fraction`).
        num_comparisons: values of k.
        num_draws: random draws of the k comparisons.
        solver: as for `adapt`.
        strategies: how the k are chosen; each but `random` has a curve of its own in `strategies`, with the paired
            difference from random.

    Returns:
        `curve`, one row per k with `accuracy` and its interval, `seen` users beside, and `monotone_within_ci95`.

    Raises:
        UserError: no held-out users, or no k or draw.
    """
    from pal_ds.adaptation.few_shot import evaluate_few_shot
    from pal_ds.inference.load_run import open_run

    where = run_of(run)
    with for_people():
        opened = open_run(
            RunDirectory(where.path),
            str(where.step),
            trust=where.trust_checkpoint,
            trust_code=where.trust_code,
        )
        figures = evaluate_few_shot(
            opened,
            list(num_comparisons),
            num_draws,
            solver=solver,
            strategies=tuple(strategies),
        )
        return dict(figures)


def adapt(
    run: AnyRun,
    pairs: Records | None,
    out: str | os.PathLike[str],
    *,
    split: str | None = None,
    num_pairs: int | None = None,
    seed: int = 0,
    solver: Literal["auto", "newton", "adam", "reference"] = "auto",
) -> AdaptedUsers:
    """Fits new users to a run from a few comparisons each; the model stays as it is.

    Args:
        run: what was trained.
        pairs: their comparisons; None takes `split` of the run's data.
        out: new or empty folder for the user table.
        split: split of the run's data, without `pairs`; unset, `unseen_train`.
        num_pairs: comparisons to keep per user; None keeps all.
        seed: of the draw of comparisons.
        solver: `newton` from statistics; `adam`, the same objective; `reference`, AdamW that stops early.

    Raises:
        UserError: a head without users, comparisons that cannot be read, or an `out` that holds something.
    """
    from pal_ds.adaptation.run import AdaptOptions, adapt_run

    where, folder = run_of(run), at_home(out)
    with for_people():
        options = AdaptOptions(
            pairs=as_pairs(pairs, "pairs"),
            split=split,
            num_pairs=num_pairs,
            step=str(where.step),
            seed=seed,
            solver=solver,
            trust_checkpoint=where.trust_checkpoint,
            trust_code=where.trust_code,
        )
        report = adapt_run(RunDirectory(where.path), folder, options)
        return AdaptedUsers(folder, dict(report))


def consolidate(
    run: AnyRun,
    out: str | os.PathLike[str],
    *,
    user_ids: Sequence[str] | None = None,
    users: str | os.PathLike[str] | None = None,
    population: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Writes a scalar reward model that transformers opens by itself, with its own code.

    Args:
        run: what was trained.
        out: folder to make.
        user_ids: a folder OUT/USER for each of these, on one set of weights.
        users: folder of new users that `adapt` fitted: a folder OUT/USER for each of them, unless `user_ids`,
            `population` or an option says for whom; then users are looked up there first.
        population: score for the average user, as is done where nobody is named.
        options: for whom, `user`, `mixture` or `group`; `with_users`, `dtype` (fp32 or bf16),
            `max_shard_size` ("4GB"), `data_path`, `reward_mean`, `reward_std`.

    Returns:
        The facts of export.json: `audience`, `step`, `max_difference` to the run's own scores, ...

    Raises:
        UserError: an unknown option or user, an `out` that holds something, or a run that cannot be exported.
    """
    from pal_ds.export import ExportOptions, export, export_users, users_of

    for name, given, is_right in (
        ("user_ids", user_ids, not isinstance(user_ids, str)),
        ("users", users, users is None or isinstance(users, str | os.PathLike)),
    ):
        if not is_right:
            raise UserError(
                f"consolidate: {name} is {given!r:.60}. `users` is a folder that `adapt` wrote, and `user_ids` a list "
                "of ids."
            )
    where, folder = run_of(run), at_home(out)
    known = {field.name for field in fields(ExportOptions)} - {"step", "users_dir"}
    if unknown := options.keys() - known:
        raise UserError(
            f"consolidate: no option {min(unknown)!r}. There are {', '.join(sorted(known))}."
        )
    leave = {"trust_checkpoint": where.trust_checkpoint, "trust_code": where.trust_code}
    chosen = ExportOptions(
        **{"quiet": True, **leave, **options},
        step=str(where.step),
        users_dir=None if users is None else at_home(users),
    )
    with for_people():
        directory = RunDirectory(where.path)
        named = {"user", "mixture", "group", "with_users"} & options.keys()
        if population and (named - {"with_users"} or user_ids is not None):
            raise UserError("consolidate: population is given beside who else to score for.")
        if chosen.users_dir is not None and user_ids is None and not population and not named:
            user_ids = users_of(chosen.users_dir)
        if user_ids is None:
            return dict(export(directory, folder, chosen))
        return dict(export_users(directory, folder, list(user_ids), chosen))
