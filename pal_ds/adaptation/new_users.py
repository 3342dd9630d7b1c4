"""New users that `adapt` fits: their comparisons, who is fitted together, and shards of fitted users on the disk.

Shards let a fit of many users be cut off and taken up again. OUT/fitting/KEY/00012.safetensors is whole or absent, and
holds a hash of its own numbers: a flipped bit is found. KEY is a hash of everything that the numbers depend on: shards
of other inputs are never taken for these.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.plan import keyed_generator
from pal_ds.data.sources import Source
from pal_ds.data.tables import PreparedData
from pal_ds.errors import writing
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.inference.load_run import OpenRun
from pal_ds.io.files import replacing
from pal_ds.users.ids import POPULATION_USER, named

logger = logging.getLogger(__name__)

FOLDER = "fitting"
_VERSION = 3
PAIRS_PER_SHARD = 2**14
"""Number of pairs that are lost at most when a fit is cut off."""
POSITIONS_PER_SHARD = 2**18
"""Hidden states of a backbone that are in memory at once: 4 GB at 4,096 numbers each."""


def few_per_user(data: PreparedData, rows: np.ndarray, num_pairs: int, seed: int) -> np.ndarray:
    """At most `num_pairs` of the comparisons `rows` per user, drawn by (seed, user id): other users do not matter."""
    if len(rows) == 0:
        return rows
    users = data.comparisons["user"][rows]
    by_user = np.argsort(users, kind="stable")
    owners, first = np.unique(users[by_user], return_index=True)
    kept = [
        keyed_generator("few", seed, data.users[owner]).permutation(own)[:num_pairs]
        for owner, own in zip(owners, np.split(rows[by_user], first[1:]), strict=True)
    ]
    return np.sort(np.concatenate(kept))


@dataclass(frozen=True)
class NewUsers:
    """Users to fit, their comparisons, and the shards in which they are fitted together."""

    ids: list[str]
    table_rows: np.ndarray
    """Place in `ids` of each user of the data, -1 for those without comparisons here."""
    rows: np.ndarray
    """Comparisons, by user."""
    first: np.ndarray
    """Place in `rows` of each user's first comparison, and the end; int64 [U + 1]."""
    spans: list[tuple[int, int]]
    """Users of each shard."""

    @staticmethod
    def of(data: PreparedData, rows: np.ndarray, positions: np.ndarray) -> "NewUsers":
        """The users of the comparisons `rows`; `positions` are those scored of each response of the data."""
        user = data.comparisons["user"][rows]
        rows = rows[np.argsort(user, kind="stable")]
        owners, first = np.unique(data.comparisons["user"][rows], return_index=True)
        table_rows = np.full(len(data.users), -1, np.int64)
        table_rows[owners] = np.arange(len(owners))
        table = data.comparisons[rows]
        share = (positions[table["a"]] + positions[table["b"]]) / POSITIONS_PER_SHARD
        shares = np.add.reduceat(np.maximum(share, 1 / PAIRS_PER_SHARD), first)
        ids = [data.users[owner] for owner in owners]
        return NewUsers(ids, table_rows, rows, np.append(first, len(rows)), _spans(shares))

    def rows_of(self, span: tuple[int, int]) -> np.ndarray:
        return self.rows[self.first[span[0]] : self.first[span[1]]]


def _spans(shares: np.ndarray) -> list[tuple[int, int]]:
    """Runs of users that fill at most one shard together; a user who fills more has one alone."""
    spans, begin, filled = [], 0, 0.0
    for user, share in enumerate(shares.tolist()):
        if filled + share > 1 and user > begin:
            spans.append((begin, user))
            begin, filled = user, 0.0
        filled += share
    return [*spans, (begin, len(shares))]


def num_positions(restored: OpenRun, data: PreparedData) -> np.ndarray:
    """Scored positions of each response."""
    num_responses = len(data.response_prompt)
    if data.responses is None or restored.parts.collator.scored_positions == "last":
        return np.ones(num_responses, np.int64)
    return data.responses.lengths_of(np.arange(num_responses))


class FittedShard(NamedTuple):
    """Users of one shard, in their order."""

    logits: Float[Tensor, "U K"]
    num_pairs: Int[Tensor, "U"]
    num_right: Float[Tensor, "U"]
    """Pairs that the fit explains, fp64; a tie counts half."""
    num_right_before: Float[Tensor, "U"]
    """Pairs that the population's point explains, which is what the users got before."""
    covariance: Float[Tensor, "U c c"]
    """Covariance of each user's point (c is K), see `posterior.py`; c is 0 where nothing gives users a posterior."""
    margin_std: Float[Tensor, "U"]
    margin_std_before: Float[Tensor, "U"]
    """See `user_posteriors.UserPosteriors`; 0 where nothing gives users one."""
    num_right_left_out: Float[Tensor, "n"]
    """Pairs that fits without them explain, see `left_out.py`; empty where none were made."""
    log_reliability: Float[Tensor, "n"] = torch.zeros(0)
    """r_u of each user; empty where the run's users have none."""


class ShardFolder:
    """The shards of one set of inputs under OUT/fitting."""

    def __init__(self, out: Path, inputs: Mapping[str, object]) -> None:
        """`inputs` (JSON) is what the fits depend on."""
        text = json.dumps({"version": _VERSION, **inputs}, sort_keys=True)
        self.key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        """Hash of the inputs."""
        self.out, self.path = out, out / FOLDER / self.key

    def begin(self) -> None:
        """Make the folder. Raises StorageError where OUT cannot be written."""
        with writing(self.out):
            self.path.mkdir(parents=True, exist_ok=True)

    def read(self, number: int, num_users: int) -> FittedShard | None:
        """The shard if it is there and whole."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._file(number)
        if not path.is_file():
            return None
        try:
            parts = load_file(path)
            written_hash = bytes(parts.pop("hash", torch.empty(0)).tolist())
            shard = FittedShard(**parts)
            if written_hash != _hash_of(shard):
                raise ValueError("not the numbers that were written")
        except (SafetensorError, TypeError, ValueError) as error:
            logger.warning("%s: damaged (%s); its users are fitted again", path, error)
            return None
        return shard if len(shard.logits) == num_users else None

    def write(self, number: int, shard: FittedShard) -> None:
        """Puts the shard on the disk under its name, whole. Raises StorageError where that fails."""
        from safetensors.torch import save_file

        path = self._file(number)
        with writing(path), replacing(path) as aside:
            own = torch.tensor(list(_hash_of(shard)), dtype=torch.uint8)
            save_file({**shard._asdict(), "hash": own}, aside)

    def remove(self) -> None:
        """Shards of these inputs and of any others: the result has been written."""
        shutil.rmtree(self.out / FOLDER, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.path / f"{number:05d}.safetensors"


def _hash_of(shard: FittedShard) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in shard:
        digest.update(part.contiguous().numpy().tobytes())
    return digest.digest()


def warn_of_pairs(
    ids: list[str], restored: OpenRun, pairs: Path | Source | None, dropped: Mapping[str, int]
) -> None:
    """Warn of users whom the run has, too, of what is not fitted, and of `pairs` that were dropped or name nobody."""
    if pairs is not None and dropped:
        logger.warning(
            "%s: %d pairs say nothing of a user and are left out (%s), and so is who has no others",
            pairs,
            sum(dropped.values()),
            ", ".join(f"{reason} {count}" for reason, count in dropped.items()),
        )
    if "tie_threshold" in restored.users.scalars:
        logger.warning(
            "users.tie_threshold: a new user's own threshold of ties is not fitted: new users get the run's"
        )
    known = sorted(user for user in ids if user in restored.users)
    if known:
        logger.warning(
            "%d of %d users are in the run already (%s): fitted from these pairs alone, and with --users this "
            "fit stands for them in place of the trained one",
            len(known),
            len(ids),
            named(known),
        )
    if pairs is not None and POPULATION_USER in ids:
        logger.warning(
            "%s: some comparisons name no user_id, and are fitted together as the user %r. Lines to score that name "
            "none still get the rewards of the run's average user",
            pairs,
            POPULATION_USER,
        )
