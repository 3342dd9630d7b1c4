"""The audience that an exported model scores for: one user, a mixture of prototypes, or the population."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pal_ds.data.parse import nearest
from pal_ds.errors import UserError
from pal_ds.heads.base import Head, UserState
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.inference.mixtures import user_mixtures
from pal_ds.inference.posterior_file import read_posterior
from pal_ds.remote_code.simplex import check_point
from pal_ds.users import UserTable
from pal_ds.users.ids import POPULATION_USER, generic_row_of


@dataclass(frozen=True)
class Audience:
    """A mixture (None: the head knows no users) and what to call it in words."""

    mixture: list[float] | None
    description: str

    def __post_init__(self) -> None:
        """Raises UserError for a mixture that holds no finite numbers, as damaged weights make one."""
        if self.mixture is not None and not all(map(math.isfinite, self.mixture)):
            raise UserError(
                f"the mixture of {self.description} holds numbers that are not finite: the head's weights or the table "
                "of users are damaged. Restore them, or take another --step."
            )


def choose_audience(
    head: Head,
    users: UserTable,
    *,
    user: str | None = None,
    mixture: Sequence[float] | None = None,
    users_dir: Path | None = None,
    group: str | None = None,
    groups: Sequence[str] = (),
) -> Audience:
    """Return the audience: a user of the run (or of an adapted table), a group of it, a mixture, or the population.

    `groups` are those of the run's data, in the order of their codes. The population is as evaluation uses it: the
    generic user's s_u, or its mean over the run's users.

    Raises:
        UserError: two of user, group and mixture given, an unknown user or group, a mixture that is no point of the
            simplex, any of them for a head without users, or a group for a head that does not ask for it.
    """
    given = {"--user": user, "--group": group, "--mixture": mixture}
    if len(named := [name for name, value in given.items() if value is not None]) > 1:
        raise UserError(
            f"{' and '.join(named)} are {len(named)} answers to one question: give one of them."
        )
    if not head.is_personal:
        if named:
            raise UserError(
                f"{type(head).__name__} has one reward for everyone: leave out {named[0]}."
            )
        return Audience(None, "everyone (this reward knows no users)")
    if mixture is not None:
        try:
            point = check_point(mixture, head.point_sizes, head.on_simplex)
            return Audience(point, "the mixture it was given")
        except ValueError as error:
            raise UserError(f"--mixture: {error}") from None
    if group is not None:
        return _of_group(head, group, groups)
    if user is None:
        population = user_mixtures(head, users)[-1]
        description = f"the population, the mean of {len(users)} users"
        if "group" in head.needs:
            description = "no group in particular, the mean of all"
        elif "logits" not in head.needs:
            description = "a user of whom nothing is known"
        elif generic_row_of(users.ids) >= 0:
            description = f"the generic user ({POPULATION_USER})"
        return Audience(population.tolist(), description)
    return Audience(mixtures_of(head, users, [user], users_dir)[0].tolist(), "one user")


def _of_group(head: Head, group: str, groups: Sequence[str]) -> Audience:
    if "group" not in head.needs:
        raise UserError(
            f"--group: {type(head).__name__} does not ask for the group of a comparison. Give --user or --mixture."
        )
    if group not in groups:
        raise UserError(
            f"--group {group}: the run's data have no such group{nearest(group, groups)}; there are "
            f"{', '.join(groups)}."
        )
    place = torch.tensor([groups.index(group)])
    with torch.no_grad():
        point = head.eval().mixture_weights(
            UserState(group=place.to(next(head.parameters()).device))
        )
    return Audience(point[0].tolist(), f"the group {group}")


def mixtures_of(
    head: Head, users: UserTable, user_ids: Sequence[str], users_dir: Path | None = None
) -> Float[Tensor, "n K"]:
    """Return s_u of each user: of the table that `adapt` left in `users_dir` where it has them, else of the run's.

    Raises:
        UserError: a user that neither has or whose point the run's table does not hold, or an adapted table for
            another number of prototypes.
    """
    if "group" in head.needs:
        raise UserError(
            f"--user: {type(head).__name__} asks for the group of a comparison, not for its user. Give --group NAME."
        )
    table = users
    if users_dir is not None:
        table = UserTable.load(users_dir)
        if table.num_prototypes not in head.point_sizes:
            raise UserError(
                f"{users_dir}: its users have {table.num_prototypes} prototypes, the run has "
                f"{head.num_prototypes}. Adapt them to this run."
            )
    rows = torch.from_numpy(table.ids.find(user_ids))
    logits = torch.zeros(len(rows), table.num_prototypes)
    adapted = rows >= 0
    logits[adapted] = table.logits[rows[adapted]]
    others = [user_id for user_id, row in zip(user_ids, rows.tolist(), strict=True) if row < 0]
    of_run = user_ids if users_dir is None else others
    if "logits" not in head.needs and any(user in users for user in of_run):
        raise UserError(
            f"--user {of_run[0]}: {type(head).__name__} makes a user's point from comparisons. Run `adapt` with some "
            "of this user's and give its folder as --users."
        )
    # Who is known to the run alone has no direction of their own.
    logits[~adapted, : head.num_prototypes] = users.logits[users.rows(others)]
    with torch.no_grad():
        return head.eval().mixture_weights(UserState(logits))


def posteriors_of(
    user_ids: Sequence[str], mixtures: Sequence[list[float] | None], users_dir: Path | None
) -> list[dict[str, object] | None]:
    """Return what `PalRewardConfig.posterior` holds of each user; None for those whom `adapt` left no posterior of."""
    none: list[dict[str, object] | None] = [None] * len(user_ids)
    if users_dir is None:
        return none
    table = UserTable.load(users_dir)
    stored = read_posterior(users_dir, len(table.ids), table.num_prototypes)
    if stored is None:
        return none
    rows = table.ids.find(user_ids).tolist()
    return [
        None if row < 0 else {"mixture": mixture, "covariance": stored.covariance[row].tolist()}
        for row, mixture in zip(rows, mixtures, strict=True)
    ]
