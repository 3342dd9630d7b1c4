"""New users from a few comparisons: everything is frozen but their logits, all of them fitted at once.

Each user's logits maximise the likelihood of the user's comparisons times a Gaussian prior whose mean and covariance
are those of the run's own users (empirical Bayes): with no comparison a user is the typical one, with many the
prior fades. The objective is not convex where rewards are distances or cosines, hence one start per prototype
beside the prior's mean; the best of them is kept.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pal_ds.data.batch import Batch, Collator
from pal_ds.heads.base import Features, Head, UserState
from pal_ds.heads.shapes import Float, Int
from pal_ds.losses import PreferenceLoss
from pal_ds.model import RewardModel
from pal_ds.progress import progress_bar
from pal_ds.users import UserTable

NUM_STEPS = 100
LEARNING_RATE = 0.1
VERTEX_LOGIT = 2.0
"""How far a start leans towards its prototype."""
PAIRS_PER_CHUNK = 4096


@dataclass(frozen=True)
class LogitPrior:
    """Gaussian over logits; a softmax ignores a shift, so logits are centred before they are measured."""

    mean: Float[Tensor, "K"]
    precision: Float[Tensor, "K K"]

    @staticmethod
    def of(users: UserTable) -> "LogitPrior":
        """From the run's users; shrunk to their mean variance, since there may be fewer users than prototypes."""
        logits = users.logits.double().cpu()
        centred = logits - logits.mean(1, keepdim=True)
        num_users, num_prototypes = centred.shape
        if num_users == 0:
            return LogitPrior(torch.zeros(num_prototypes), torch.eye(num_prototypes))
        mean = centred.mean(0)
        spread = centred - mean
        covariance = spread.T @ spread / num_users
        isotropic = covariance.diagonal().mean().clamp(min=0.1) * torch.eye(
            num_prototypes, dtype=torch.float64
        )
        weight = num_users / (num_users + 4.0 * num_prototypes)
        blended = weight * covariance + (1 - weight) * isotropic
        # The direction along which a softmax is blind has no variance of its own.
        blended = blended + 1e-3 * torch.eye(num_prototypes, dtype=torch.float64)
        return LogitPrior(mean.float(), torch.linalg.inv(blended).float())

    def penalty(self, logits: Float[Tensor, "U K"]) -> Float[Tensor, "U"]:
        """Minus the log density, up to a constant."""
        away = logits - logits.mean(1, keepdim=True) - self.mean
        return 0.5 * ((away @ self.precision) * away).sum(1)


def fit_users(
    model: RewardModel,
    loss: PreferenceLoss,
    collator: Collator,
    rows: np.ndarray,
    user_index: np.ndarray,
    num_users: int,
    prior: LogitPrior,
    device: torch.device,
    *,
    shown: bool = False,
) -> Float[Tensor, "U K"]:
    """Logits of users 0..num_users-1 from the comparisons `rows`, of which `user_index` says whose each is.

    Users are independent of each other: they are fitted in chunks, and which share a chunk changes no result but
    its rounding.
    """
    model.eval()
    for module in model.head.modules():
        # A hard mixture has no gradient; without dropout and noise, training mode is the soft one.
        module.train(not isinstance(module, nn.Dropout))
    logits = prior.mean.repeat(num_users, 1)
    order = np.argsort(user_index, kind="stable")
    chunks = _chunks(user_index[order])
    with progress_bar("fitting users", len(chunks), shown=shown, unit="users") as advance:
        for begin, end in chunks:
            chosen = order[begin:end]
            users, index = np.unique(user_index[chosen], return_inverse=True)
            batch = collator(rows[chosen], np.arange(len(chosen))).to(device)
            with torch.no_grad():
                features = model.backbone(batch)
            owner = torch.from_numpy(index).to(device)
            fitted = _fit_chunk(model.head, loss, features, batch, owner, len(users), prior)
            logits[torch.from_numpy(users)] = fitted.cpu()
            advance(len(users))
    model.eval()
    return logits


def _chunks(sorted_users: np.ndarray) -> list[tuple[int, int]]:
    """Runs of whole users, of about PAIRS_PER_CHUNK comparisons each."""
    if len(sorted_users) == 0:
        return []
    ends = np.append(np.flatnonzero(np.diff(sorted_users)) + 1, len(sorted_users))
    chunks, begin = [], 0
    for end, following in zip(ends, np.append(ends[1:], math.inf), strict=True):
        if following - begin > PAIRS_PER_CHUNK:
            chunks.append((begin, int(end)))
            begin = int(end)
    return chunks


def _fit_chunk(
    head: Head,
    loss: PreferenceLoss,
    features: Features,
    batch: Batch,
    owner: Int[Tensor, "n"],
    num_users: int,
    prior: LogitPrior,
) -> Float[Tensor, "U K"]:
    """Adam on the logits of all users and starts at once; the start with the best objective, per user."""
    device, num_prototypes = owner.device, head.num_prototypes
    prior = LogitPrior(prior.mean.to(device), prior.precision.to(device))
    starts = torch.cat(
        [torch.zeros(1, num_prototypes), VERTEX_LOGIT * torch.eye(num_prototypes)]
    ).to(device)
    logits = (prior.mean + starts[:, None, :]).repeat(1, num_users, 1).requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)

    # One call for all starts: the responses are projected once, however many user points look at them.
    num_starts, num_pairs = len(starts), len(owner)
    repeated = features._replace(
        response_index=features.response_index.repeat(num_starts, 1),
        prompt_index=None
        if features.prompt_index is None
        else features.prompt_index.repeat(num_starts, 1),
    )
    label, begin, end, required = (
        field.repeat(num_starts)
        for field in (batch.label, batch.window_start, batch.window_end, batch.required_margin)
    )

    def objective() -> Float[Tensor, "starts U"]:
        output = head(repeated, UserState(logits[:, owner].flatten(0, 1)))
        per_pair = loss(output.margin, label, begin, end, required).view(num_starts, num_pairs)
        likelihood = torch.zeros(num_starts, num_users, device=device).index_add(1, owner, per_pair)
        return likelihood + prior.penalty(logits.flatten(0, 1)).view(num_starts, num_users)

    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
        optimizer.zero_grad(set_to_none=True)
        objective().sum().backward(inputs=[logits])
        optimizer.step()
    with torch.no_grad():
        best = objective().argmin(0)
        return logits[best, torch.arange(num_users, device=device)]
