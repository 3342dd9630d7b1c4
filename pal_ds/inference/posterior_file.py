"""How sure a fit is of each user, beside the user table on disk: covariances of points, bound to it by a hash."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from pal_ds.errors import UserError, writing
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.io.boundary import reading
from pal_ds.io.files import feed, replacing
from pal_ds.users import UserTable
from pal_ds.users.files import USER_FILES
from pal_ds.users.ids import named

logger = logging.getLogger(__name__)

POSTERIOR = "posterior.safetensors"
"""Name of the file beside a user table."""
REACH = 3**0.5
"""Standard deviations from the fitted point at which the slope along an axis is taken: the outer nodes of Gauss and
Hermite's three. A reward that bends moves less out there than its derivative says."""
_FORMAT = "pal_ds.posterior/1"
_REMEDY = "Fit the users again with `pal-ds adapt`."


class StoredPosterior(NamedTuple):
    """The posterior of some users' points."""

    covariance: Float[Tensor, "U K K"]
    """Mean squared deviation of each user's point from the fitted one, fp32; see `adaptation/posterior.py`."""

    def standard_deviation(self, slope: Float[Tensor, "U K"]) -> Float[Tensor, "U"]:
        """The standard deviation of <slope, point> of each user."""
        variance = torch.einsum("uk,ukl,ul->u", slope, self.covariance, slope)
        return variance.clamp(min=0).sqrt()


def write_posterior(folder: Path, covariance: Float[Tensor, "U K K"]) -> None:
    """Write the covariances of the users of the table in `folder`, which lies there already.

    Raises:
        StorageError: it cannot be written.
    """
    path = folder / POSTERIOR
    with writing(path), replacing(path) as aside:
        # One key: the writer of safetensors puts several in any order, and the same fit has the same bytes.
        metadata = {_FORMAT: _hash_of_table(folder)}
        save_file({"covariance": covariance.float().contiguous()}, aside, metadata)


def read_posterior(folder: Path, num_users: int, num_prototypes: int) -> StoredPosterior | None:
    """Read the posterior of all users of a table; None where an older version fitted them, or no likelihood was.

    Raises:
        UserError: it is damaged, or belongs to another table.
    """
    path = folder / POSTERIOR
    if not path.is_file():
        return None
    with reading(path, "posterior of a user table", _REMEDY):
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            covariance = file.get_tensor("covariance")
        if _FORMAT not in metadata:
            raise ValueError(f"is of another format than {_FORMAT}")
        if metadata[_FORMAT] != _hash_of_table(folder):
            raise UserError(
                f"{path}: belongs to another user table than the one beside it: one of the two was replaced. {_REMEDY}"
            )
        if tuple(covariance.shape) != (num_users, num_prototypes, num_prototypes):
            raise ValueError("does not have a row for each user of the table")
        if not covariance.isfinite().all():
            raise ValueError("holds what is no finite number")
    return StoredPosterior(covariance.float())


def known_posterior(folder: Path, what: str) -> Callable[[Sequence[str]], StoredPosterior]:
    """Read a table's posterior once; returns that of the named users, in their order. `what` is who asks: `--std`.

    Raises:
        UserError: a table without a posterior; from the returned function, a user who is not in the table.
    """
    table = UserTable.load(folder)
    stored = read_posterior(folder, len(table.ids), table.num_prototypes)
    if stored is None:
        raise UserError(
            f"{what}: {folder} holds no {POSTERIOR}, which `pal-ds adapt` writes for runs with a logistic loss whose "
            "users are mixtures: not with --no_posterior, nor where head.mixture is signed or free, nor did older "
            "versions. If this run is such a one, fit the users again."
        )
    covariance = stored.covariance

    def of_users(user_ids: Sequence[str]) -> StoredPosterior:
        if unknown := [user for user in user_ids if user not in table]:
            raise UserError(
                f"{what}: nothing says how sure user {named(unknown)} is, who is not among the {len(table)} users of "
                f"{folder}: `pal-ds adapt` writes it of those whom it fits."
            )
        return StoredPosterior(covariance[table.rows(user_ids)])

    return of_users


def axes_of(covariance: Float[Tensor, "U K K"]) -> Float[Tensor, "U D K"]:
    """The axes of each user's covariance, a standard deviation long: sum_d a_d a_d^T is the covariance.

    The shortest is left out where it is next to nothing for everybody, as for points of a simplex: D is K or K - 1.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    axes = (vectors * values.clamp(min=0).sqrt()[:, None]).mT.float()
    if len(axes) and axes.shape[1] > 1 and float(axes[:, 0].abs().max()) < 1e-3:
        axes = axes[:, 1:]
    return axes


def _hash_of_table(folder: Path) -> str:
    digest = xxhash.xxh3_128()
    for name in USER_FILES:
        feed(digest, folder / name)
    return digest.hexdigest()
