"""Records of users, and the Adam that moves those named alone: nothing here costs more for who is not named."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.users.config import Scalar, UsersConfig
from pal_ds.users.ids import UserIds

BLOCK_ROWS = 2**16
"""Rows that are made, read or written at a time."""

RELIABILITY_BETA2 = 0.9
"""Decay of the second moment of reliability, see `UserRows.beta2`."""


class UserRows:
    """`records` [U, 3V + 2] fp32: a user's V values, first and second moments, step count and `seen` side by side.

    The values are K logits and behind them, where the table has them, the logarithms of `scalars`, in their order.
    A row is one piece of memory because rows are met at random: apart, its parts would each be fetched from afar. The
    two counts are int32 in the same bits. The properties are views of all rows; writing to them writes the table.
    """

    def __init__(
        self,
        num_rows: int,
        num_prototypes: int,
        device: torch.device | str = "cpu",
        *,
        scalars: tuple[Scalar, ...] = (),
    ):
        self.num_prototypes, self.scalars = num_prototypes, scalars
        width = width_of(num_prototypes, len(scalars))
        self.records = torch.zeros(num_rows, width, device=device)

    def of(self, records: Float[Tensor, "U R"]) -> "UserRows":
        """Rows with the values of these, that are the given records."""
        rows = UserRows(0, self.num_prototypes, records.device, scalars=self.scalars)
        rows.records = records
        return rows

    @property
    def num_values(self) -> int:
        """V."""
        return self.records.shape[1] // 3

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the properties that a table on disk keeps."""
        own = (f"log_{name}" for name in self.scalars)
        return ("logits", *own, "exp_avg", "exp_avg_sq", "step", "seen")

    def beta2(self, of_logits: float) -> float | Float[Tensor, "V"]:
        """Decay of the second moment of each value.

        That of reliability is short: it grows with the scale of margins, and the prior reads from it what a user's
        comparisons tell at that scale now, not while the head was untrained.
        """
        if "reliability" not in self.scalars:
            return of_logits
        device = self.records.device
        betas = torch.full((self.num_values,), of_logits, dtype=torch.float64, device=device)
        betas[self.place_of("reliability")] = min(of_logits, RELIABILITY_BETA2)
        return betas

    @property
    def logits(self) -> Float[Tensor, "U K"]:
        return self.records[:, : self.num_prototypes]

    def place_of(self, name: Scalar) -> int:
        """Place of the logarithm of a scalar among the V values; of a table that has it."""
        assert name in self.scalars, f"this table holds no {name}"
        return self.num_prototypes + self.scalars.index(name)

    @property
    def log_reliability(self) -> Float[Tensor, "U"]:
        """r of each user, whose margins are multiplied by exp(r); of a table that has it."""
        return self.records[:, self.place_of("reliability")]

    @property
    def log_tie_threshold(self) -> Float[Tensor, "U"]:
        """q of each user, whose threshold of ties is the run's times exp(q); of a table that has it."""
        return self.records[:, self.place_of("tie_threshold")]

    @property
    def exp_avg(self) -> Float[Tensor, "U V"]:
        return self.records[:, self.num_values : 2 * self.num_values]

    @property
    def exp_avg_sq(self) -> Float[Tensor, "U V"]:
        return self.records[:, 2 * self.num_values : 3 * self.num_values]

    @property
    def step(self) -> Int[Tensor, "U"]:
        return self.records.view(torch.int32)[:, -2]

    @property
    def seen(self) -> Int[Tensor, "U"]:
        return self.records.view(torch.int32)[:, -1]

    def __len__(self) -> int:
        return len(self.records)

    def values_of(self, rows: Int[Tensor, "n"]) -> Float[Tensor, "n V"]:
        # Not `logits[rows]`: indexing goes column by column, each time through the whole memory; this goes row by row.
        return self.records.index_select(0, rows)[:, : self.num_values].contiguous()

    @torch.no_grad()
    def apply(
        self,
        rows: Int[Tensor, "n"],
        gradients: Float[Tensor, "n V"],
        order: Int[Tensor, "n"] | None,
        learning_rate: float,
        config: UsersConfig,
    ) -> None:
        """Apply an Adam step (arXiv 1412.6980) to the users in `rows` with their summed gradients.

        `order` is each gradient's place in the update (its global comparison index, distinct within
        a user), None that of the arguments: a user's gradients are summed in that order in fp32, so
        the result is the same to the bit however an update was split over ranks and micro-steps.
        Bias correction counts the user's own steps, as the per-user parameters of the reference do.
        Users not named stay as they are. Nothing waits for the device where `rows` lie on the host.
        """
        device, num = self.records.device, self.num_values
        rows, total = sum_by_row(rows, gradients, order)
        rows, total = rows.to(device), total.to(device)
        if config.max_row_norm is not None:
            norm = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
            total = total * (config.max_row_norm / norm).clamp(max=1.0)
        beta1, beta2 = config.betas[0], self.beta2(config.betas[1])
        records = self.records.index_select(0, rows)
        # Contiguous: on strided parts torch may round otherwise.
        parts = records[:, : 3 * num].split(num, dim=1)
        values, exp_avg, exp_avg_sq = (part.contiguous() for part in parts)
        counts = records.view(torch.int32)[:, -2:]
        step = counts[:, :1].double().add_(1)
        counts[:, :1] = step
        counts[:, 1:] = 1
        exp_avg.lerp_(total, 1 - beta1)
        exp_avg_sq.mul_(beta2).add_(total.square_().mul_(1 - beta2))
        correction1 = torch.pow(beta1, step).neg_().add_(1).float()
        correction2 = torch.pow(beta2, step).neg_().add_(1).float()
        size = (exp_avg_sq / correction2).sqrt_().add_(config.epsilon)
        values.sub_((exp_avg / correction1).mul_(learning_rate).div_(size))
        self.records[rows] = torch.cat([values, exp_avg, exp_avg_sq, records[:, 3 * num :]], dim=1)


def width_of(num_prototypes: int, num_scalars: int = 0) -> int:
    """Numbers of a record."""
    return 3 * (num_prototypes + num_scalars) + 2


def blocks(num_rows: int) -> Iterator[tuple[int, int]]:
    """(begin, end) of all rows, `BLOCK_ROWS` at a time."""
    for begin in range(0, num_rows, BLOCK_ROWS):
        yield begin, min(begin + BLOCK_ROWS, num_rows)


def sum_by_row(
    rows: Int[Tensor, "n"], gradients: Float[Tensor, "n K"], order: Int[Tensor, "n"] | None = None
) -> tuple[Int[Tensor, "m"], Float[Tensor, "m K"]]:
    """The distinct rows, ascending, and the fp32 sum of each one's gradients, first to last in `order`.

    Rows are told apart where they are given: on the host, which then knows their number without asking the device.
    """
    by_row = None
    if order is not None:
        by_row = torch.argsort(order.to(rows.device), stable=True)
        rows = rows.index_select(0, by_row)
    rows, place = torch.sort(rows, stable=True)
    by_row = place if by_row is None else by_row.index_select(0, place)
    distinct, lengths = torch.unique_consecutive(rows, return_counts=True)
    values = gradients.index_select(0, by_row.to(gradients.device)).float()
    lengths = lengths.to(gradients.device)
    sums = torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    return distinct, sums


def fresh_rows(
    seed: int,
    ids: UserIds,
    num_prototypes: int,
    std: float,
    device: torch.device | str = "cpu",
    *,
    scalars: tuple[Scalar, ...] = (),
) -> UserRows:
    """Rows of users who have learned nothing: logits by (seed, id) alone, spread by `std`; scalars of 1."""
    rows = UserRows(len(ids), num_prototypes, device, scalars=scalars)
    for begin, end in blocks(len(ids)):
        # Half a second per 100,000 users and core, of which hashing takes most.
        rows.logits[begin:end] = _fresh_logits(seed, ids[begin:end], num_prototypes, std)
    return rows


def _fresh_logits(seed: int, ids: UserIds, num_prototypes: int, std: float) -> Float[Tensor, "u K"]:
    """Normal(0, std) up to its far tails: per logit, twelve hashed 16-bit uniforms, summed.

    Integer sums are the same bits on every machine, library version and batch of users; library
    generators and vectorised logarithms are not.
    """
    num_bytes = 12 * 2 * num_prototypes
    digests = (hashlib.shake_256(f"{seed}\0{i}".encode()).digest(num_bytes) for i in ids)
    words = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.int16)
    # A signed 16-bit uniform has mean -1/2 and variance 2^32 / 12.
    sums = words.view(len(ids), num_prototypes, 12).sum(-1, dtype=torch.int64) + 6
    return sums.float() / 2**16 * std
