"""The mixtures of the users whose comparisons are scored."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.collator import Collator
from pal_ds.distributed.world import World
from pal_ds.heads.base import Head, UserState
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.inference.context_points import pairs_per_forward, points_in_training
from pal_ds.inference.scoring import Forward
from pal_ds.users import TrainedUsers, UserTable
from pal_ds.users.ids import generic_row_of
from pal_ds.users.rows import blocks


def user_mixtures(head: Head, users: UserTable) -> Float[Tensor, "U+1 K"]:
    """Each user's mixture as the head uses it in evaluation, and as the last row that of who is not in the table.

    That is the mixture of the generic user where the table holds one, else the mean of all.
    """
    head.eval()
    with torch.no_grad():
        mixtures = head.mixture_weights(UserState(users.logits))
    return torch.cat([mixtures, population_mixture(mixtures, generic_row_of(users.ids))])


@dataclass(frozen=True)
class MixtureSource:
    """Source of the users' mixtures for an evaluation during training."""

    forward: Forward
    """Makes the points of a head that reads users' comparisons."""
    head: Head
    users: TrainedUsers
    world: World
    own: Collator | None = None
    """Reads the run's own data; None where the scored comparisons are of these data."""
    micro_batch_pairs: int = 1
    """Comparisons that a forward of the training holds."""


def with_mixtures(
    source: MixtureSource, collator: Collator, rows: np.ndarray
) -> tuple[Collator, Float[Tensor, "u+1 K"] | None]:
    """Take the mixtures of the users whom the comparisons `rows` name, and a collator that numbers them as these rows.

    The last mixture is the population's, taken over the table block by block where someone is unknown. None in place
    of mixtures where users are their groups.
    """
    forward, head, users, world = source.forward, source.head, source.users, source.world
    if "group" in head.needs:
        return collator, None
    owners, first = np.unique(collator.user_rows(rows), return_index=True)
    user_codes = collator.data.comparisons["user"][rows]
    known, codes = owners[owners >= 0], user_codes[first][owners >= 0]
    head.eval()
    mixtures = _mixtures_of(head, users, torch.from_numpy(known))
    if "context" in head.needs:
        own = source.own or collator
        most_pairs = pairs_per_forward(head, own, source.micro_batch_pairs)
        mixtures = points_in_training(forward, head, own, collator, codes, world, most_pairs)
    population = mixtures.new_full((1, mixtures.shape[1]), torch.nan)
    if collator.generic_row >= 0:
        population = _mixtures_of(head, users, torch.tensor([collator.generic_row]))
    elif len(known) < len(owners):
        sums = [
            _mixtures_of(head, users, torch.arange(*block)).double().sum(0, keepdim=True)
            for block in blocks(len(users))
        ]
        population = (
            (torch.stack(sums).sum(0) / len(users)).float()
            if sums
            else population_mixture(mixtures)
        )
    places = np.full(len(collator.data.users), -1, np.int64)
    places[user_codes] = np.searchsorted(known, collator.user_rows(rows))
    places[user_codes[collator.user_rows(rows) < 0]] = -1
    return replace(collator, table_rows=places), torch.cat([mixtures, population])


def _mixtures_of(head: Head, users: TrainedUsers, rows: Tensor) -> Float[Tensor, "n K"]:
    with torch.no_grad():
        logits = users.fetch(rows).leaf(rows.to(users.device)).detach()
        return head.mixture_weights(UserState(logits))


def population_mixture(
    mixtures: Float[Tensor, "U K"], generic_row: int = -1
) -> Float[Tensor, "1 K"]:
    """s_u of the generic user, else its mean over the users of a table; the simplex's centre where there are none."""
    num_users, num_prototypes = mixtures.shape
    if generic_row >= 0:
        return mixtures[generic_row : generic_row + 1]
    if num_users == 0:
        return mixtures.new_full((1, num_prototypes), 1.0 / num_prototypes)
    return mixtures.mean(0, keepdim=True)
