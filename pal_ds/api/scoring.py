"""`score` and `consolidate` from Python."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pal_ds.api.run import AnyRun, Records, for_people, run_of
from pal_ds.errors import UserError
from pal_ds.runs.run_dir import RunDirectory


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
        texts: records of `prompt` and `response` (strings or chat messages), or of `text`.
        user: id of a user of the run, or of `users`; without any of these three, the average user.
        mixture: a point of K numbers in place of a user.
        group: a group of the run's data, for a head that asks for it.
        users: new users that `adapt` fitted, among whom `user` is looked up first.
        trust_remote_code: run the code that lies in an exported folder; see `load_reward_model`.

    Returns:
        One reward for each text, in order.

    Raises:
        UserError: no such model or user, two of user, mixture and group, or a text that cannot be read.
    """
    from pal_ds.export.card import FACTS_NAME
    from pal_ds.inference.score_texts import read_rows, rows_of
    from pal_ds.reward_models import Whom, scorer_of_export, scorer_of_run

    where = run_of(model)
    whom = Whom(user, mixture, group, None if users is None else Path(users))
    with for_people():
        is_file = isinstance(texts, str | os.PathLike)
        rows = read_rows(Path(texts)) if is_file else rows_of(texts)
        if (where.path / FACTS_NAME).is_file():
            scorer = scorer_of_export(where.path, whom, trust_remote_code=trust_remote_code)
        else:
            run, trust = RunDirectory(where.path), where.trust_checkpoint
            scorer = scorer_of_run(run, whom, str(where.step), trust=trust)
        return scorer.score_all(rows)


def consolidate(
    run: AnyRun,
    out: str | os.PathLike[str],
    *,
    user_ids: Sequence[str] | None = None,
    users: str | os.PathLike[str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Writes a scalar reward model that transformers opens by itself, with its own code.

    Args:
        run: what was trained.
        out: folder to make.
        user_ids: a folder OUT/USER for each of these, on one set of weights.
        users: new users that `adapt` fitted, among whom users are looked up first.
        options: for whom, `user`, `mixture` or `group`, else the average user; `with_users`, `dtype` (fp32 or bf16),
            `max_shard_size` ("4GB"), `data_path`, `reward_mean`, `reward_std`.

    Returns:
        The facts of export.json: `audience`, `step`, `max_difference` to the run's own scores, ...

    Raises:
        UserError: an unknown option or user, an `out` that holds something, or a run that cannot be exported.
    """
    from pal_ds.export import ExportOptions, export, export_users

    where, folder = run_of(run), Path(out)
    known = {field.name for field in fields(ExportOptions)} - {"step", "users_dir"}
    if unknown := options.keys() - known:
        raise UserError(
            f"consolidate: no option {min(unknown)!r}. There are {', '.join(sorted(known))}."
        )
    chosen = ExportOptions(
        **{"quiet": True, "trust_checkpoint": where.trust_checkpoint, **options},
        step=str(where.step),
        users_dir=None if users is None else Path(users),
    )
    with for_people():
        directory = RunDirectory(where.path)
        if user_ids is None:
            return dict(export(directory, folder, chosen))
        return dict(export_users(directory, folder, list(user_ids), chosen))
