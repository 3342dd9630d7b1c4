"""The prior of users' logits in training: its pull on the rows of an update, and how it is learnt from the table.

With n_u comparisons of user u to train on, minimised is the mean over comparisons of
    loss + 1 / (2 n_u) (w_u - mu)^T P (w_u - mu)
so that who has few comparisons stays close to the population, and who has many goes where they lead. Adding it to the
gradients of the users in an update keeps the step's cost independent of the number of users.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.heads.sufficient_statistics import PointSpace
from pal_ds.users.config import RowPriorState
from pal_ds.users.rows import UserRows

LEARN_EVERY = 10
"""Updates between two estimates of the prior, each of which is a step of EM: the rows themselves move in between."""
MOST_USERS = 1024
"""Users by whom it is estimated, where there are more."""
SMALLEST_VARIANCE = 1e-4
"""Users who are alike to the last digit have a prior with an inverse all the same."""


@dataclass
class RowPrior:
    """N(mean, precision^-1) over logits; where a shift of all K moves no point, over centred ones."""

    mean: Float[torch.Tensor, "K"]
    """mu, fp32."""
    precision: Float[torch.Tensor, "K K"]
    """P, fp32; zero along the constant direction unless the space is `linear`."""
    share: Float[torch.Tensor, "U"]
    """1 / n_u of each row of the table; 0 for a row without comparisons of its own, which nothing pulls."""
    space: PointSpace
    """Where the logits' points lie."""

    @staticmethod
    def fresh(
        num_prototypes: int,
        num_comparisons: np.ndarray,
        space: PointSpace,
        std: float,
        device: torch.device | str,
    ) -> "RowPrior":
        """The prior that rows are drawn from at the start: N(0, std^2), and N(0, 1) where they all start at 0.

        `num_comparisons` is n_u by row of the table.
        """
        basis = basis_of(num_prototypes, space)
        precision = (basis @ basis.T).float() / (std**2 or 1.0)
        counts = torch.from_numpy(num_comparisons.astype(np.float32))
        share = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0)
        zeros = torch.zeros(num_prototypes, device=device)
        return RowPrior(zeros, precision.to(device), share.to(device), space)

    def pull(
        self, logits: Float[torch.Tensor, "n K"], rows: Int[torch.Tensor, "n"]
    ) -> Float[torch.Tensor, "n K"]:
        """P (w - mu) / n_u of each comparison, from its user's logits: to be added to the gradient of its loss."""
        share = self.share[rows.to(self.share.device)]
        return (logits - self.mean) @ self.precision * share[:, None]

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
        """Estimate mean and precision by a step of EM from records of users; None where too few have been trained.

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
        basis = basis_of(rows.num_prototypes, self.space)
        step = rows.step[trained].cpu().double()[:, None]
        square = rows.exp_avg_sq[trained].cpu().double() / (1 - beta2**step)
        # The moment is of gradients of a mean over B; of all that `step` updates held, n_u t B / N were the user's.
        fisher = torch.einsum("kd,uk,ke->ude", basis, num_comparisons * step * square, basis)
        points = rows.logits[trained].cpu().double() @ basis
        mean, size = points.mean(0), points.shape[1]
        spread = points - mean
        precision = basis.T @ self.precision.cpu().double() @ basis
        identity = torch.eye(size, dtype=torch.float64)
        covariance = spread.T @ spread + torch.linalg.inv(fisher + precision).sum(0)
        # Fewer users than coordinates know little of single directions: shrunk to the mean of all.
        overall = covariance.diagonal().mean() / len(points) * identity
        covariance = (covariance + size * overall) / (len(points) + size)
        precision = torch.linalg.inv(covariance + SMALLEST_VARIANCE * identity)
        return {
            "mean": (basis @ mean).float().tolist(),
            "precision": (basis @ precision @ basis.T).float().tolist(),
        }

    def state_dict(self) -> RowPriorState:
        """Mean and precision; the rest follows from the data."""
        return {"mean": self.mean.tolist(), "precision": self.precision.tolist()}

    def load_state_dict(self, state: RowPriorState) -> None:
        """Take over mean and precision. Raises ValueError where they are of another K."""
        device = self.mean.device
        mean = torch.tensor(state["mean"], dtype=torch.float32)
        precision = torch.tensor(state["precision"], dtype=torch.float32)
        if mean.shape != self.mean.shape or precision.shape != self.precision.shape:
            raise ValueError(
                f"the stored prior of users is of shape {tuple(precision.shape)}, the table has {len(self.mean)} logits"
            )
        self.mean, self.precision = mean.to(device), precision.to(device)


def basis_of(num_prototypes: int, space: PointSpace) -> Float[torch.Tensor, "K D"]:
    """Orthonormal, fp64, of what moves a point: all (D = K), or all but the constant direction (D = K - 1)."""
    if space == "linear":
        return torch.eye(num_prototypes, dtype=torch.float64)
    centring = torch.eye(num_prototypes, dtype=torch.float64) - 1 / num_prototypes
    return torch.linalg.qr(centring[:, 1:]).Q
