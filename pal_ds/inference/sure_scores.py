"""Scores that come with their standard deviation, or that are lower where it is large."""

import math
from dataclasses import replace
from pathlib import Path

from pal_ds.errors import UserError
from pal_ds.inference.posterior_file import known_posterior
from pal_ds.inference.score_texts import Covariance, Scorer


def with_posterior(
    scorer: Scorer, users_dir: Path | None, user: str | None, *, pessimism: float = 0.0
) -> Scorer:
    """The scorer with standard deviations, from the posterior that `adapt` left in a folder, or of an exported user.

    Args:
        scorer: scores for `user`, or for the users whom lines name.
        users_dir: folder that `adapt` wrote; None for the user of an export.
        user: the one user of all lines.
        pessimism: standard deviations to take off each reward, 0 or more.

    Raises:
        UserError: a pessimism below 0, or nothing says how sure the users' points are; while scoring, for users whom
            the folder does not hold.
    """
    if not (math.isfinite(pessimism) and pessimism >= 0):
        raise UserError(f"--pessimism is {pessimism}; it must be a finite number, 0 or more.")
    config = scorer.model.config
    exported = getattr(config, "posterior", None) or {}
    is_own = exported.get("mixture") == getattr(config, "mixture", None)
    own: Covariance | None = exported.get("covariance") if is_own else None
    if users_dir is None and own is None:
        raise UserError(
            "--std, --pessimism: nothing says how sure this user is. Give --users, a folder that `adapt` wrote, with "
            "--user or lines with user_id; or an export of one of its users."
        )
    posterior_of = None
    if users_dir is not None:
        posterior_of = known_posterior(users_dir, "--std, --pessimism")
        own = None if user is None else posterior_of([user]).covariance[0].tolist()

    def covariance_of(name: str | None) -> Covariance:
        if name is None:
            if own is None:
                raise UserError(
                    "--std, --pessimism: some lines name no user, and nothing says how sure the average user is. Give "
                    "each line a user_id, or --user."
                )
            return own
        assert posterior_of is not None, "lines that name users need their table"
        return posterior_of([name]).covariance[0].tolist()

    return replace(scorer, covariance_of=covariance_of, pessimism=pessimism)
