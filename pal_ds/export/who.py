"""For whom an exported model scores: one user, a mixture of prototypes, or the population."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pal_ds.errors import UserError
from pal_ds.evaluate import user_mixtures
from pal_ds.exported.simplex import check_point
from pal_ds.heads.base import Head, UserState
from pal_ds.users import UserTable


@dataclass(frozen=True)
class Audience:
    """A mixture (None: the head knows no users) and what to call it in words."""

    mixture: list[float] | None
    description: str


def choose_audience(
    head: Head,
    users: UserTable,
    *,
    user: str | None = None,
    mixture: Sequence[float] | None = None,
    users_dir: Path | None = None,
) -> Audience:
    """One user of the run (or of an adapted table), a given mixture, or the population.

    The population is the mean of s_u over the run's users, as evaluation uses it.

    Raises:
        UserError: user and mixture both given, an unknown user, a mixture that is no point of the
            simplex, or either of them for a head without users.
    """
    if user is not None and mixture is not None:
        raise UserError("--user and --mixture are two answers to one question: give one of them.")
    if not head.is_personal:
        if user is not None or mixture is not None:
            raise UserError(
                f"{type(head).__name__} has one reward for everyone: leave out --user and "
                "--mixture."
            )
        return Audience(None, "everyone (this reward knows no users)")
    if mixture is not None:
        try:
            point = check_point(mixture, head.num_prototypes, head.on_simplex)
            return Audience(point, "the mixture it was given")
        except ValueError as error:
            raise UserError(f"--mixture: {error}") from None
    if user is None:
        population = user_mixtures(head, users)[-1]
        return Audience(population.tolist(), f"the population, the mean of {len(users)} users")
    if "group" in head.needs:
        raise UserError(
            f"--user: {type(head).__name__} asks for the group of a comparison, not for its user. Give --mixture with "
            "a 1 at the group's place."
        )
    table = users
    if users_dir is not None:
        adapted = UserTable.load(users_dir)
        if adapted.num_prototypes != head.num_prototypes:
            raise UserError(
                f"{users_dir}: its users have {adapted.num_prototypes} prototypes, the run has "
                f"{head.num_prototypes}. Adapt them to this run."
            )
        table = adapted if user in adapted or user not in users else users
    if table is users and "logits" not in head.needs and user in users:
        raise UserError(
            f"--user {user}: {type(head).__name__} makes a user's point from comparisons. Run `adapt` with some of "
            "this user's and give its folder as --users."
        )
    with torch.no_grad():
        row = head.eval().mixture_weights(UserState(table.logits[table.rows([user])]))[0]
    return Audience(row.tolist(), "one user")
