"""Users: id <-> row, mixture logits, and an Adam whose cost does not depend on their number.

The table lives outside the model and outside ZeRO-3. A step reads rows as a leaf, takes their
gradients back as (row, gradient, position in the update) and moves those rows alone, so 10 users
and 10 million cost the same, and a user can be added, moved or forgotten without touching the
model. Every rank holds the table and applies the same gathered gradients in the same order, hence
the same bits. Axes: U users, K prototypes, n gradient rows of an update.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pal_ds.errors import UserError
from pal_ds.heads.shapes import Float, Int

USER_FILES = ("users.safetensors", "users.arrow")
"""What a table is on disk."""
_FORMAT = "pal_ds.users/1"
_NAMED_IN_ERRORS = 5


@dataclass(frozen=True)
class UsersConfig:
    """How user logits start and learn."""

    learning_rate: float = 5e-2
    """Peak rate of the rows' own Adam; it follows the model's schedule. One update moves a logit by
    about this much at most, so a user settles in tens of comparisons."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments, counted in the row's own updates."""
    epsilon: float = 1e-8
    """Added to the root of the second moment."""
    init_std: float = 1.0
    """Spread of a new user's logits, as in the reference. On synthetic ideal points with 6 and 30
    comparisons per user, 0 and 0.1 were no better (at 6, half a point of accuracy worse): the
    spread parts the prototypes early. 0 starts every user at the even mixture."""
    max_row_norm: float | None = None
    """Bound on the norm of a user's summed gradient in one update; unset means no bound. Adam
    divides by the gradient's scale, so this matters only against outliers."""

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        for name in ("learning_rate", "epsilon"):
            if not getattr(self, name) > 0:
                raise UserError(f"users.{name} is {getattr(self, name)}; it must be above 0.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"users.betas is {self.betas}; both must be at least 0 and below 1.")
        if not self.init_std >= 0:
            raise UserError(f"users.init_std is {self.init_std}; it must be 0 or more.")
        if self.max_row_norm is not None and not self.max_row_norm > 0:
            raise UserError(
                f"users.max_row_norm is {self.max_row_norm}; it must be above 0, or unset."
            )


class UserTable:
    """One row per user: logits w and Adam moments [U, K] fp32, step count [U] int64, `seen` [U].

    `seen` (bool) is whether the user has taken part in an update. A row is a place in these tensors
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
        self.ids: list[str] = []
        self._row_of: dict[str, int] = {}
        self.logits = torch.empty(0, num_prototypes, device=device)
        self.exp_avg = torch.empty_like(self.logits)
        self.exp_avg_sq = torch.empty_like(self.logits)
        self.step = torch.empty(0, dtype=torch.int64, device=device)
        self.seen = torch.empty(0, dtype=torch.bool, device=device)
        self.add(ids)

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, user_id: object) -> bool:
        return user_id in self._row_of

    def rows(self, ids: Sequence[str]) -> Int[Tensor, "n"]:
        """Row of each id, int64 on the table's device. Raises UserError naming unknown ids."""
        unknown = [user_id for user_id in ids if user_id not in self._row_of]
        if unknown:
            raise UserError(
                f"unknown user {_name(unknown)}; the table holds {len(self)} users. "
                "Fit new users with `pal_ds adapt`, or score them with the population mixture."
            )
        return torch.tensor([self._row_of[i] for i in ids], dtype=torch.int64).to(self.step.device)

    def leaf(self, rows: Int[Tensor, "B"]) -> Float[Tensor, "B K"]:
        """A copy of the rows' logits that gathers gradients: what enters the model."""
        return self.logits[rows].detach().requires_grad_()

    def mixtures(self, temperature: float = 1.0) -> Float[Tensor, "U K"]:
        """softmax(w_u / temperature) of every user, fp32."""
        return torch.softmax(self.logits / temperature, dim=-1)

    @torch.no_grad()
    def apply(
        self,
        rows: Int[Tensor, "n"],
        gradients: Float[Tensor, "n K"],
        order: Int[Tensor, "n"],
        learning_rate: float,
    ) -> None:
        """One Adam step (arXiv 1412.6980) for the users in `rows` on their summed gradients.

        `order` is each gradient's place in the update (its global comparison index, distinct within
        a user): a user's gradients are summed in that order in fp32, so the result is the same to
        the bit however an update was split over ranks and micro-steps. Bias correction counts the
        user's own steps, as the per-user parameters of the reference do. Users not named stay as
        they are. Nothing here waits for the device.
        """
        device = self.logits.device
        rows, order = rows.to(device, torch.int64), order.to(device)
        by_order = torch.argsort(order, stable=True)
        by_row = by_order[torch.argsort(rows[by_order], stable=True)]
        rows = rows[by_row]
        total = _sum_runs(rows, gradients.to(device)[by_row].float())
        if self.config.max_row_norm is not None:
            norm = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
            total = total * (self.config.max_row_norm / norm).clamp(max=1.0)
        beta1, beta2 = self.config.betas
        step = self.step[rows] + 1
        exp_avg = self.exp_avg[rows].lerp(total, 1 - beta1)
        exp_avg_sq = self.exp_avg_sq[rows] * beta2 + (1 - beta2) * total.square()
        correction1 = (1 - beta1 ** step.double()).float().unsqueeze(-1)
        correction2 = (1 - beta2 ** step.double()).float().unsqueeze(-1)
        size = (exp_avg_sq / correction2).sqrt() + self.config.epsilon
        logits = self.logits[rows] - learning_rate * (exp_avg / correction1) / size
        # A user named m times is written m times with the same values: no reduction to distinct
        # rows is needed.
        self.logits[rows], self.exp_avg[rows], self.exp_avg_sq[rows] = logits, exp_avg, exp_avg_sq
        self.step[rows], self.seen[rows] = step, True

    def add(self, ids: Iterable[str]) -> None:
        """Append users; fresh logits depend on (seed, id) alone, so adding one moves no other.

        Raises UserError for ids that are empty, not text, given twice or already in the table.
        """
        new = list(ids)
        if bad := [i for i in new if not isinstance(i, str) or not i]:
            raise UserError(f"user id {bad[0]!r} is not a text of at least one character.")
        if known := [user_id for user_id in new if user_id in self._row_of]:
            raise UserError(f"user {_name(known)} is already in the table; remove it first.")
        if len(set(new)) < len(new):
            twice = [user_id for user_id, count in Counter(new).items() if count > 1]
            raise UserError(f"user {_name(twice)} is given twice; list every user once.")
        fresh = _fresh_logits(self.seed, new, self.num_prototypes, self.config.init_std)
        self._row_of.update((i, row) for row, i in enumerate(new, start=len(self.ids)))
        self.ids += new
        for name, tensor in self._tensors().items():
            rows = fresh if name == "logits" else torch.zeros(len(new), *tensor.shape[1:])
            setattr(self, name, torch.cat([tensor, rows.to(tensor)]))

    def remove(self, user_id: str) -> None:
        """Forget a user: later rows move up by one, values unchanged. UserError if unknown."""
        row = int(self.rows([user_id]))
        del self.ids[row]
        self._row_of = {i: r for r, i in enumerate(self.ids)}
        for name, tensor in self._tensors().items():
            setattr(self, name, torch.cat([tensor[:row], tensor[row + 1 :]]))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs: ids, seed, logits, Adam state and `seen`."""
        return {"ids": list(self.ids), "seed": self.seed, **self._tensors()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the table. Raises UserError where K or the number of users disagree."""
        ids, own = list(state["ids"]), self._tensors()
        for name, tensor in own.items():
            expected = (len(ids), *tensor.shape[1:])
            if tuple(state[name].shape) != expected:
                raise UserError(
                    f"users: {name} is {tuple(state[name].shape)}, expected {expected} (users, "
                    "prototypes): the table belongs to a head with another num_prototypes, or its "
                    "files are damaged."
                )
        if len(set(ids)) < len(ids):
            raise UserError("users: an id occurs twice in the stored table: its files are damaged.")
        self.ids, self.seed = ids, int(state["seed"])
        self._row_of = {user_id: row for row, user_id in enumerate(ids)}
        for name, tensor in own.items():
            setattr(self, name, state[name].to(tensor, copy=True))

    def save(self, directory: Path | str) -> None:
        """Write users.safetensors (logits, Adam state) and users.arrow (id, row, seen)."""
        # Imported here: training and scoring with a table in memory need torch alone.
        import pyarrow as pa
        from safetensors.torch import save_file

        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {k: t.cpu().contiguous() for k, t in self._tensors().items() if k != "seen"}
        metadata = {"format": _FORMAT, "seed": str(self.seed)}
        save_file(tensors, str(directory / USER_FILES[0]), metadata)
        columns = {
            "id": pa.array(self.ids, pa.string()),
            "row": pa.array(range(len(self)), pa.int64()),
            "seen": pa.array(self.seen.tolist(), pa.bool_()),
        }
        index = pa.table(columns)
        with pa.ipc.new_file(str(directory / USER_FILES[1]), index.schema) as writer:
            writer.write_table(index)

    @classmethod
    def load(
        cls,
        directory: Path | str,
        config: UsersConfig | None = None,
        device: torch.device | str = "cpu",
    ) -> "UserTable":
        """Read what `save` wrote. Raises UserError where files are missing, foreign or disagree."""
        import pyarrow as pa
        from safetensors import safe_open

        tensor_path, index_path = (Path(directory) / name for name in USER_FILES)
        for path in (tensor_path, index_path):
            if not path.is_file():
                raise UserError(
                    f"{path} is missing; a user table is users.safetensors and users.arrow."
                )
        with safe_open(str(tensor_path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{tensor_path} is not a user table of format {_FORMAT}.")
            state: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        with pa.ipc.open_file(str(index_path)) as reader:
            index = reader.read_all().sort_by("row")
        if index["row"].to_pylist() != list(range(len(index))):
            raise UserError(f"{index_path}: column row is not 0 .. users - 1: the file is damaged.")
        state |= {"ids": index["id"].to_pylist(), "seed": metadata["seed"]}
        state["seen"] = torch.tensor(index["seen"].to_pylist(), dtype=torch.bool)
        table = cls(state["logits"].shape[1], config=config, device=device)
        table.load_state_dict(state)
        return table

    def _tensors(self) -> dict[str, Tensor]:
        names = ("logits", "exp_avg", "exp_avg_sq", "step", "seen")
        return {name: getattr(self, name) for name in names}


def _sum_runs(rows: Int[Tensor, "n"], values: Float[Tensor, "n K"]) -> Float[Tensor, "n K"]:
    """Sum of `values` over the run of equal `rows` that each place lies in, first to last."""
    starts = torch.ones_like(rows)
    starts[1:] = (rows[1:] != rows[:-1]).long()
    run = starts.cumsum(0) - 1
    lengths = torch.zeros_like(rows).index_add_(0, run, torch.ones_like(rows))
    # As many segments as places, the spare ones empty: the number of runs stays on the device.
    sums = torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    return sums[run]


def _fresh_logits(
    seed: int, ids: list[str], num_prototypes: int, std: float
) -> Float[Tensor, "u K"]:
    """Normal(0, std) up to its far tails: per logit, twelve hashed 16-bit uniforms, summed.

    Integer sums are the same bits on every machine, library version and batch of users; library
    generators and vectorised logarithms are not.
    """
    if not ids:
        return torch.empty(0, num_prototypes)
    num_bytes = 12 * 2 * num_prototypes
    digests = (hashlib.shake_256(f"{seed}\0{i}".encode()).digest(num_bytes) for i in ids)
    words = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int16)
    # A signed 16-bit uniform has mean -1/2 and variance 2^32 / 12.
    sums = words.view(len(ids), num_prototypes, 12).long().sum(-1) + 6
    return sums.float() / 2**16 * std


def _name(ids: list[str]) -> str:
    shown = ", ".join(repr(user_id) for user_id in ids[:_NAMED_IN_ERRORS])
    return (
        shown if len(ids) <= _NAMED_IN_ERRORS else f"{shown} and {len(ids) - _NAMED_IN_ERRORS} more"
    )
