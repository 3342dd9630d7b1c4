"""The prior of users' logits in training: its pull on the rows of an update, and how it is learnt from the table.

With n_u comparisons of user u to train on, minimised is the mean over comparisons of
    loss + 1 / (2 n_u) (w_u - mu)^T P (w_u - mu)
so that who has few comparisons stays close to the population, and who has many goes where they lead. Adding it to the
gradients of the users in an update keeps the step's cost independent of the number of users.

With `users.reliability` the margins of user u are multiplied by exp(r_u), a temperature of each user as in crowd
Bradley-Terry (Chen et al., WSDM 2013), and r_u^2 / (2 n_u sigma^2) is added. The mean stays 0: the scale of all users
is the head's matter, and a user of whom nothing is known has r = 0. The log of a user's factor of the threshold of ties
(`users.tie_threshold`) is pulled alike, towards the threshold of the run.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import numpy as np
import torch

from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.heads.sufficient_statistics import PointSpace
from pal_ds.users.config import RowPriorState, Scalar
from pal_ds.users.rows import UserRows

LEARN_EVERY = 10
"""Updates between two estimates of the prior, each of which is a step of EM: the rows themselves move in between."""
MOST_USERS = 1024
"""Users by whom it is estimated, where there are more."""
SCALAR_STD = 0.5
"""Standard deviation of the logarithm of each scalar at the start, and where none is learnt: factors of 0.37 to 2.7 for
95 in 100 users."""
SMALLEST_VARIANCE = 1e-4
"""Users who are alike to the last digit have a prior with an inverse all the same."""


@dataclass
class RowPrior:
    """N(mean, precision^-1) over logits; where a shift of all K moves no point, over centred ones. And scalars'."""

    mean: Float[torch.Tensor, "K"]
    """mu, fp32."""
    precision: Float[torch.Tensor, "K K"]
    """P, fp32; zero where `basis` does not reach."""
    share: Float[torch.Tensor, "U"]
    """1 / n_u of each row of the table; 0 for a row without comparisons of its own, which nothing pulls."""
    basis: Float[torch.Tensor, "K D"]
    """The directions of logits that have a prior, fp64 on the host; see `basis_of`."""
    variances: dict[Scalar, float] = field(default_factory=dict)
    """sigma^2 of the logarithm of each scalar that users have, in the order of the columns."""

    @staticmethod
    def fresh(
        num_comparisons: np.ndarray,
        basis: Float[torch.Tensor, "K D"],
        std: float,
        device: torch.device | str,
        *,
        scalars: tuple[Scalar, ...] = (),
    ) -> "RowPrior":
        """The prior that rows are drawn from at the start: N(0, std^2), and N(0, 1) where they all start at 0.

        `num_comparisons` is n_u by row of the table.
        """
        precision = (basis @ basis.T).float() / (std**2 or 1.0)
        counts = torch.from_numpy(num_comparisons.astype(np.float32))
        share = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)
        zeros = torch.zeros(len(basis), device=device)
        variances = dict.fromkeys(scalars, SCALAR_STD**2)
        return RowPrior(zeros, precision.to(device), share.to(device), basis, variances)

    def pull(
        self, values: Float[torch.Tensor, "n V"], rows: Int[torch.Tensor, "n"]
    ) -> Float[torch.Tensor, "n V"]:
        """P (w - mu) / n_u of each comparison, and r / (n_u sigma^2): to be added to the gradient of its loss.

        `values` are those of the comparison's user, as `UserTable.leaf` has them.
        """
        share = self.share[rows.to(self.share.device)]
        size = len(self.mean)
        pulls = [(values[:, :size] - self.mean) @ self.precision * share[:, None]]
        for place, variance in enumerate(self.variances.values(), size):
            pulls.append(values[:, place : place + 1] / variance * share[:, None])
        return torch.cat(pulls, 1)

    @cached_property
    def sampled(self) -> Int[torch.Tensor, "m"]:
        """Rows by which the prior is estimated: the same on every rank, and evenly over the table.

        On the host, and found once: only this looks at every row.
        """
        rows = torch.nonzero(self.share.cpu()).flatten()
        if len(rows) <= MOST_USERS:
            return rows
        return rows[torch.linspace(0, len(rows) - 1, MOST_USERS, dtype=torch.float64).long()]

    def estimate(
        self, rows: UserRows, num_comparisons: float, beta2: float
    ) -> RowPriorState | None:
        """Estimate the prior by a step of EM from records of users; None where too few have been trained.

        A user's posterior is N(w_u, (F_u + P)^-1) (Laplace), with F_u the empirical Fisher information: the sum over
        the user's comparisons of squared gradients, which Adam's second moment knows. Without it the variance would be
        that of estimates that were shrunk, hence too small, and smaller each time.

        Args:
            rows: those `sampled`.
            num_comparisons: N B / t, for N comparisons to train on, B of them in an update and t updates made.
            beta2: decay of the second moments.
        """
        trained = rows.step > 0
        if int(trained.sum()) < 2:
            return None
        basis, size = self.basis, self.basis.shape[1]
        step = rows.step[trained].cpu().double()[:, None]
        decay = torch.as_tensor(rows.beta2(beta2), dtype=torch.float64).cpu()
        square = rows.exp_avg_sq[trained].cpu().double() / (1 - decay**step)
        # The moment is of gradients of a mean over B; of all that `step` updates held, n_u t B / N were the user's.
        information = num_comparisons * step * square
        of_logits = information[:, : len(basis)]
        fisher = torch.einsum("kd,uk,ke->ude", basis, of_logits, basis)
        points = rows.logits[trained].cpu().double() @ basis
        mean = points.mean(0)
        spread = points - mean
        precision = basis.T @ self.precision.cpu().double() @ basis
        identity = torch.eye(size, dtype=torch.float64)
        covariance = spread.T @ spread + torch.linalg.inv(fisher + precision).sum(0)
        # Fewer users than coordinates know little of single directions: shrunk to the mean of all.
        overall = covariance.diagonal().mean() / len(points) * identity
        covariance = (covariance + size * overall) / (len(points) + size)
        precision = torch.linalg.inv(covariance + SMALLEST_VARIANCE * identity)
        learnt: RowPriorState = {
            "mean": (basis @ mean).float().tolist(),
            "precision": (basis @ precision @ basis.T).float().tolist(),
        }
        variances = {}
        for name, variance in self.variances.items():
            place = rows.place_of(name)
            own = rows.records[trained, place].cpu().double()
            unsure = 1 / (information[:, place] + 1 / variance)
            variances[name] = float((own.square() + unsure).mean()) + SMALLEST_VARIANCE
        return _with_variances(learnt, variances)

    def state_dict(self) -> RowPriorState:
        """Mean, precision and variance; the rest follows from the data."""
        state: RowPriorState = {"mean": self.mean.tolist(), "precision": self.precision.tolist()}
        return _with_variances(state, self.variances)

    def load_state_dict(self, state: RowPriorState) -> None:
        """Take what `state_dict` gave. Raises ValueError where it is of another K, or lacks a scalar's variance."""
        device = self.mean.device
        mean = torch.tensor(state["mean"], dtype=torch.float32)
        precision = torch.tensor(state["precision"], dtype=torch.float32)
        if mean.shape != self.mean.shape or precision.shape != self.precision.shape:
            raise ValueError(
                f"the stored prior of users is of shape {tuple(precision.shape)}, the table has {len(self.mean)} logits"
            )
        for name in self.variances:
            if f"{name}_variance" not in state:
                of_what = name.replace("_", " ")
                raise ValueError(f"the stored prior of users has no variance of their {of_what}")
        stored = cast(dict[str, float], state)
        self.variances = {name: stored[f"{name}_variance"] for name in self.variances}
        self.mean, self.precision = mean.to(device), precision.to(device)


def _with_variances(state: RowPriorState, variances: dict[Scalar, float]) -> RowPriorState:
    """The state with the variances of scalars under their names."""
    named = {f"{name}_variance": variance for name, variance in variances.items()}
    return cast(RowPriorState, {**state, **named})


def no_basis(num_prototypes: int) -> Float[torch.Tensor, "K 0"]:
    """The basis of logits without a prior."""
    return torch.zeros(num_prototypes, 0, dtype=torch.float64)


def basis_of(num_prototypes: int, space: PointSpace) -> Float[torch.Tensor, "K D"]:
    """Orthonormal, fp64, of what moves a point: all (D = K), or all but the constant direction (D = K - 1)."""
    if space == "linear":
        return torch.eye(num_prototypes, dtype=torch.float64)
    centring = torch.eye(num_prototypes, dtype=torch.float64) - 1 / num_prototypes
    return torch.linalg.qr(centring[:, 1:]).Q
