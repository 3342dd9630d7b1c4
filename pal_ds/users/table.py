"""The table that one process holds whole: who is in it, their rows, and what a step and a checkpoint ask of them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pal_ds.errors import UserError
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.users.config import Scalar, UsersConfig
from pal_ds.users.files import StoredUsers, check_shapes, write_users
from pal_ds.users.ids import UserIds, named
from pal_ds.users.rows import UserRows, fresh_rows


class UserTable:
    """A table with one row per user: logits w [U, K] and Adam moments [U, V] fp32, `step` and `seen` [U] int32.

    With `users.reliability` each row also holds r [U], whose exponential multiplies the user's margins, and with
    `users.tie_threshold` q [U], whose exponential multiplies the threshold of ties; V counts all of these.
    `seen` (0 or 1) is whether the user has taken part in an update. A row is a place in these tensors
    and may change when another user is removed; the id is the name that lasts.
    """

    def __init__(
        self,
        num_prototypes: int,
        ids: Iterable[str] = (),
        config: UsersConfig | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        """Raises UserError for ids that are empty, not text or given twice."""
        self.num_prototypes = num_prototypes
        self.config = UsersConfig() if config is None else config
        self.seed = seed
        self.ids = UserIds.of(())
        self._rows = UserRows(0, num_prototypes, device, scalars=self.config.scalars)
        self.add(ids)

    @property
    def logits(self) -> Float[Tensor, "U K"]:
        """w_u of every user, as a view; so are the six below."""
        return self._rows.logits

    @property
    def log_reliability(self) -> Float[Tensor, "U"]:
        """r_u of every user; of a table that has it."""
        return self._rows.log_reliability

    @property
    def log_tie_threshold(self) -> Float[Tensor, "U"]:
        """q_u of every user; of a table that has it."""
        return self._rows.log_tie_threshold

    @property
    def exp_avg(self) -> Float[Tensor, "U V"]:
        return self._rows.exp_avg

    @property
    def exp_avg_sq(self) -> Float[Tensor, "U V"]:
        return self._rows.exp_avg_sq

    @property
    def step(self) -> Int[Tensor, "U"]:
        return self._rows.step

    @property
    def seen(self) -> Int[Tensor, "U"]:
        return self._rows.seen

    @property
    def scalars(self) -> tuple[Scalar, ...]:
        """Names of the scalars that the table has, in the order of their columns."""
        return self._rows.scalars

    @property
    def has_reliability(self) -> bool:
        return "reliability" in self.scalars

    def place_of(self, name: Scalar) -> int:
        """Place of a scalar's logarithm among the V values of a row; of a table that has it."""
        return self._rows.place_of(name)

    @property
    def device(self) -> torch.device:
        return self._rows.records.device

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, user_id: object) -> bool:
        return user_id in self.ids

    def rows(self, ids: Sequence[str]) -> Int[Tensor, "n"]:
        """Row of each id, int64 on the table's device. Raises UserError naming unknown ids."""
        rows = self.ids.find(ids)
        if (rows < 0).any():
            unknown = [ids[place] for place in np.flatnonzero(rows < 0).tolist()]
            raise UserError(
                f"unknown user {named(unknown)}; the table holds {len(self)} users. "
                "Fit new users with `pal-ds adapt`, or score them with the population mixture."
            )
        return torch.from_numpy(rows).to(self.device)

    def fetch(self, rows: Int[Tensor, "n"]) -> "UserTable":
        """Itself: all rows are at hand."""
        return self

    def leaf(self, rows: Int[Tensor, "B"]) -> Float[Tensor, "B V"]:
        """A copy of the rows' logits, and scalars behind them, that gathers gradients: what enters the model."""
        return self._rows.values_of(rows).requires_grad_()

    def records_of(self, rows: Int[Tensor, "n"]) -> UserRows:
        """A copy of these rows, moments and counts included."""
        return self._rows.of(self._rows.records.index_select(0, rows.to(self.device)))

    def mixtures(self, temperature: float = 1.0) -> Float[Tensor, "U K"]:
        """softmax(w_u / temperature) of every user, fp32."""
        return torch.softmax(self.logits / temperature, dim=-1)

    def apply(
        self,
        rows: Int[Tensor, "n"],
        gradients: Float[Tensor, "n V"],
        order: Int[Tensor, "n"] | None,
        learning_rate: float,
    ) -> None:
        """Apply an Adam step to the users in `rows` with their summed gradients; see `UserRows.apply`."""
        self._rows.apply(rows, gradients, order, learning_rate, self.config)

    def add(self, ids: Iterable[str]) -> None:
        """Append users; fresh logits depend on (seed, id) alone, so adding one moves no other.

        Raises UserError for ids that are empty, not text, given twice or already in the table.
        """
        new = UserIds.of(ids)
        if twice := new.repeated():
            raise UserError(f"user {named(twice)} is given twice; list every user once.")
        if len(self) and (known := new.take(np.flatnonzero(self.ids.find(new) >= 0))):
            raise UserError(f"user {named(known)} is already in the table; remove it first.")
        old = self._rows.records
        rows = fresh_rows(
            self.seed,
            new,
            self.num_prototypes,
            self.config.init_std,
            old.device,
            scalars=self.scalars,
        )
        if len(self):
            rows.records = torch.cat([old, rows.records])
        self.ids, self._rows = self.ids.joined(new), rows

    def remove(self, user_id: str) -> None:
        """Forget a user: later rows move up by one, values unchanged. UserError if unknown."""
        row = int(self.rows([user_id]))
        old = self._rows.records
        self.ids = self.ids[:row].joined(self.ids[row + 1 :])
        self._rows.records = torch.cat([old[:row], old[row + 1 :]])

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything that a resumed run needs: ids, seed, and tensors with the dtypes of the files."""
        dtypes = {"step": torch.int64, "seen": torch.bool}
        tensors = {
            name: getattr(self, name).to(dtypes.get(name, torch.float32), copy=True).contiguous()
            for name in self._rows.tensors
        }
        return {"ids": list(self.ids), "seed": self.seed, **tensors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the table. Raises UserError where K or the number of users disagree."""
        ids, names = UserIds.of(state["ids"]), self._rows.tensors
        check_shapes(
            {name: tuple(state[name].shape) for name in names}, len(ids), self.num_prototypes
        )
        if ids.repeated():
            raise UserError("users: an id occurs twice in the stored table: its files are damaged.")
        rows = self._empty(len(ids))
        for name in names:
            getattr(rows, name).copy_(state[name])
        self.ids, self.seed, self._rows = ids, int(state["seed"]), rows

    def save(self, directory: Path | str | None) -> None:
        """Write users.safetensors (logits, Adam state) and users.arrow (id, row, seen); nothing without a directory."""
        if directory is None:
            return
        records = self._rows.records
        write_users(
            directory=Path(directory),
            ids=self.ids,
            seed=self.seed,
            rows=self._rows,
            read_block=lambda begin, end: records[begin:end].cpu(),
        )

    def restore(self, stored: StoredUsers) -> None:
        """Replaces the table by a stored one. Raises UserError where K or the scalars of users disagree."""
        self._rows = stored.read(self._empty(len(stored)))
        self.ids, self.seed = stored.ids, stored.seed

    def _empty(self, num_rows: int) -> UserRows:
        return UserRows(num_rows, self.num_prototypes, self.device, scalars=self.scalars)

    @classmethod
    def load(
        cls,
        directory: Path | str,
        config: UsersConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> "UserTable":
        """Read what `save` wrote. Raises UserError where files are missing, foreign or disagree."""
        stored = StoredUsers(directory)
        if config is None:
            config = replace(UsersConfig(), **dict.fromkeys(stored.scalars, "learnt"))
        table = cls(stored.num_prototypes, config=config, device=device)
        table.restore(stored)
        return table
