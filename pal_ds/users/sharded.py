"""The table in slices: each rank holds some of the rows and moves those, and sees another's only while it needs them.

Rows travel as integers that all but one rank hold as zeros, so their sum is the row to the bit, -0.0 included.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pal_ds.errors import UserError
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.users.config import Scalar, UsersConfig
from pal_ds.users.files import StoredUsers, write_users
from pal_ds.users.ids import UserIds, named
from pal_ds.users.rows import UserRows, fresh_rows, width_of
from pal_ds.users.table import UserTable


@dataclass(frozen=True)
class Shard:
    """The slice that this process holds among how many, and how the slices are brought together."""

    index: int
    count: int
    sum_integers: Callable[[Tensor], Tensor]
    """Sum over all holders of an int32 tensor that each calls it with; the result may be the tensor itself."""

    def bounds(self, num_rows: int) -> tuple[int, int]:
        """[begin, end) of this slice: contiguous, so that a file is read in one piece."""
        size = -(-num_rows // self.count)
        return min(self.index * size, num_rows), min((self.index + 1) * size, num_rows)


@dataclass(frozen=True)
class FetchedRows:
    """Values of the distinct rows of an update."""

    rows: Int[Tensor, "m"]
    """Ascending."""
    values: Float[Tensor, "m V"]

    def leaf(self, rows: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """Make the leaf tensor that gradients reach, as `UserTable.leaf` does, from rows that were fetched."""
        return self.values.index_select(0, torch.searchsorted(self.rows, rows)).requires_grad_()


class ShardedUserTable:
    """A `UserTable` that no rank holds whole. Every method is called by all ranks alike."""

    def __init__(
        self,
        num_prototypes: int,
        ids: UserIds,
        config: UsersConfig,
        seed: int,
        device: torch.device | str,
        shard: Shard,
    ):
        """Raises UserError for ids that are empty or given twice."""
        self.num_prototypes, self.ids, self.config = num_prototypes, UserIds.of(ids), config
        self.seed, self.shard = seed, shard
        if twice := self.ids.repeated():
            raise UserError(f"user {named(twice)} is given twice; list every user once.")
        self.begin, self.end = shard.bounds(len(ids))
        own = ids[self.begin : self.end]
        self.own = fresh_rows(
            seed,
            own,
            num_prototypes,
            config.init_std,
            device,
            scalars=config.scalars,
        )

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        return self.own.scalars

    @property
    def has_reliability(self) -> bool:
        return "reliability" in self.scalars

    def place_of(self, name: Scalar) -> int:
        """Place of a scalar's logarithm among the V values of a row, as `UserTable.place_of`."""
        return self.own.place_of(name)

    @property
    def device(self) -> torch.device:
        return self.own.records.device

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, rows: Int[Tensor, "n"]) -> FetchedRows:
        """The values of these rows on every rank, by one collective over the distinct ones."""
        # On the host, where the rows of an update are known: nobody waits for a device to count them.
        wanted = np.unique(rows.cpu().numpy())
        mine = np.flatnonzero((self.begin <= wanted) & (wanted < self.end))
        values = self._from_all(
            len(wanted),
            torch.from_numpy(mine),
            lambda: self.own.values_of(self._to_device(wanted[mine] - self.begin)),
            self.own.num_values,
        )
        return FetchedRows(self._to_device(wanted), values)

    def records_of(self, rows: Int[Tensor, "n"]) -> UserRows:
        """These rows on every rank, moments and counts included, by one collective; `rows` are distinct."""
        wanted = rows.cpu()
        mine = torch.nonzero((self.begin <= wanted) & (wanted < self.end)).flatten()
        records = self._from_all(
            len(wanted),
            mine,
            lambda: self.own.records.index_select(0, (wanted[mine] - self.begin).to(self.device)),
            self.own.records.shape[1],
        )
        return self.own.of(records)

    def apply(
        self,
        rows: Int[Tensor, "n"],
        gradients: Float[Tensor, "n V"],
        order: Int[Tensor, "n"] | None,
        learning_rate: float,
    ) -> None:
        """Apply an Adam step as `UserTable.apply` does: every rank gets all gradients and moves its own rows."""
        rows = rows.cpu()
        mine = torch.nonzero((self.begin <= rows) & (rows < self.end)).flatten()
        self.own.apply(
            rows[mine] - self.begin,
            gradients.index_select(0, mine.to(gradients.device)),
            None if order is None else order[mine.to(order.device)],
            learning_rate,
            self.config,
        )

    def save(self, directory: Path | str | None) -> None:
        """Write what `UserTable.save` writes, in blocks from all ranks; the rank with a directory writes."""
        path = None if directory is None else Path(directory)
        write_users(path, self.ids, self.seed, self.own, self._block)

    def restore(self, stored: StoredUsers) -> None:
        """Replaces the table by a stored one, reading the slice of this rank. Raises UserError as `UserTable` does."""
        begin, end = self.shard.bounds(len(stored))
        own = UserRows(end - begin, self.num_prototypes, self.device, scalars=self.scalars)
        self.own = stored.read(own, first=begin)
        self.ids, self.seed, self.begin, self.end = stored.ids, stored.seed, begin, end

    def _block(self, begin: int, end: int) -> Float[Tensor, "n R"]:
        first, last = (min(max(row, self.begin), self.end) for row in (begin, end))
        block = self._from_all(
            end - begin,
            torch.arange(first - begin, last - begin),
            lambda: self.own.records[first - self.begin : last - self.begin],
            self.own.records.shape[1],
        )
        return block.cpu()

    def _from_all(
        self, num_rows: int, mine: Int[Tensor, "m"], own: Callable[[], Tensor], width: int
    ) -> Float[Tensor, "n W"]:
        """Rows of which this rank has those at the places `mine`."""
        bits = torch.zeros(num_rows, width, dtype=torch.int32, device=self.device)
        if len(mine):
            bits[mine.to(self.device)] = own().view(torch.int32)
        return self.shard.sum_integers(bits).view(torch.float32)

    def _to_device(self, rows: np.ndarray) -> Int[Tensor, "n"]:
        return torch.from_numpy(rows).to(self.device)


TrainedUsers = UserTable | ShardedUserTable
"""What training needs of a user table both have; ranks make the same calls in the same order."""


def trained_users(
    num_prototypes: int,
    ids: UserIds,
    config: UsersConfig,
    seed: int,
    device: torch.device | str,
    shard: Shard,
) -> TrainedUsers:
    """A fresh table: whole on every rank while it is small enough for that, else in slices."""
    width = width_of(num_prototypes, len(config.scalars))
    limit = config.rows_replicated(4 * width)
    if shard.count > 1 and len(ids) > limit:
        return ShardedUserTable(num_prototypes, ids, config, seed, device, shard)
    return UserTable(num_prototypes, ids, config, seed, device)
