"""New users from a few comparisons: everything is frozen but their logits, all of them fitted at once.

Each user's logits maximise the likelihood of the user's comparisons times the density of the run's own users
(empirical Bayes, `prior.py`): with no comparison a user is the typical one, with few the clusters of users whom they
fit are a guide, with many the prior fades; nothing is left to tune, and comparisons that can be separated send no logit
to infinity. Who maximises it is the solver's choice: `newton.py` from statistics, `gradient.py` by gradients. Where the
run's users have a reliability, points and reliability take turns (`reliability.py`).
"""

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pal_ds.adaptation.blocks import UserComparisons
from pal_ds.adaptation.directions import DirectionPrior, fit_directions
from pal_ds.adaptation.gradient import adam, losses_of, margins_of, reference_adamw
from pal_ds.adaptation.newton import solve
from pal_ds.adaptation.objective import SHAPES
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.adaptation.reliability import NUM_TURNS, most_likely_reliability
from pal_ds.data.batch import Batch
from pal_ds.data.collator import Collator
from pal_ds.errors import UserError
from pal_ds.heads.base import Features, Head, UserState
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.inference.mixtures import encode_users
from pal_ds.losses import PreferenceLoss
from pal_ds.model import RewardModel, user_state

PAIRS_PER_CHUNK = 2**15
FLOATS_PER_CHUNK = 2**25
"""Hidden states that are in memory at once: 128 MB, of which a fit holds a few copies."""
PAIRS_PER_FORWARD = 256
"""Comparisons per chunk where the backbone itself runs for each."""


Solver = Literal["auto", "newton", "adam", "reference"]
"""`newton`: `newton.solve`. `adam`: the same objective by Adam. `reference`: early-stopped AdamW without a prior."""


UserPrior = LogitPrior | DirectionPrior
"""Density of new users: over K logits, or with a direction of their own beside them."""


def refuse_solver(solver: Solver, head: Head, loss: PreferenceLoss) -> None:
    """Raises UserError where a solver is named that cannot be, or none can."""
    if head.residual_size and (solver in ("adam", "reference") or loss.kind not in SHAPES):
        raise UserError(
            f"--solver {solver}, loss {loss.kind}: users with a direction of their own (head.mixture free) are fitted "
            f"by newton alone, under one of the losses {', '.join(SHAPES)}. Use --solver auto and one of these, or a "
            "run with mixture: signed."
        )
    if solver == "newton" and not (head.has_statistics and loss.kind in SHAPES):
        raise UserError(
            "--solver newton: this run's head gives no statistics of a mixture (its users' points do not lie in the "
            f"span of K), or its loss is not one of {', '.join(SHAPES)}. Use --solver auto or adam."
        )


class UserPairs(NamedTuple):
    """The comparisons that users 0..num_users-1 are fitted from."""

    rows: np.ndarray
    """Rows of the comparisons table; int64 [n]."""
    user_index: np.ndarray
    """User of each comparison; int64 [n]."""
    num_users: int


class FittedUsers(NamedTuple):
    """Users who were fitted."""

    logits: Float[Tensor, "U K"]
    """[U, K + d] with directions of their own."""
    log_reliability: Float[Tensor, "U"] | None
    """r_u; None where the run's users have none."""


def fit_users(
    model: RewardModel,
    collator: Collator,
    pairs: UserPairs,
    *,
    loss: PreferenceLoss,
    prior: UserPrior,
    solver: Solver = "auto",
    initial: Float[Tensor, "U K"] | None = None,
) -> FittedUsers:
    """Fit all users of `pairs`; fp32, on the CPU.

    Users are independent of each other: they are fitted in chunks, and which share a chunk changes no result but
    its rounding. One without comparisons gets the prior's mean, and so do logits that a head does not read.

    The fit runs on the device of the model's head. `solver` `auto` takes `newton` where the head gives statistics and
    knows the loss, `adam` elsewhere; `initial` is where `reference` starts, the prior's mean where unset.

    Raises:
        UserError: `newton` for a head or a loss that it cannot do.
    """
    rows, user_index, num_users = pairs
    device = next(model.head.parameters()).device
    refuse_solver(solver, model.head, loss)
    logits, log_reliability = prior.mean.repeat(num_users, 1), None
    if "context" in model.head.needs:
        if solver != "auto":
            raise UserError(
                f"--solver {solver}: this run's head makes users' points from their comparisons; nothing is fitted. "
                "Leave --solver out."
            )
        logits = encode_users(model, collator, rows, user_index, num_users, device)
    if prior.reliability_variance is not None:
        log_reliability = torch.zeros(num_users)
    elif "logits" not in model.head.needs:
        return FittedUsers(logits, None)
    for users, chunk in chunks_of(model, collator, pairs):
        starts = logits if initial is None or "logits" not in model.head.needs else initial
        begins = starts[users].to(device)
        fitted = fit_chunk(chunk, loss, prior, solver, begins)
        logits[users] = fitted.logits.cpu()
        if log_reliability is not None and fitted.log_reliability is not None:
            log_reliability[users] = fitted.log_reliability.cpu()
    return FittedUsers(logits, log_reliability)


def chunks_of(
    model: RewardModel, collator: Collator, pairs: UserPairs
) -> Iterator[tuple[Int[Tensor, "u"], "Chunk"]]:
    """The users of `pairs` who have comparisons, some at a time, with all that a head reads of them."""
    rows, user_index, _ = pairs
    device = next(model.head.parameters()).device
    model.eval()
    for module in model.head.modules():
        # A hard mixture has no gradient; without dropout and noise, training mode is the soft one.
        module.train(not isinstance(module, nn.Dropout))
    order = np.argsort(user_index, kind="stable")
    chunks = _chunks(user_index[order], pairs_per_chunk(model.head, collator, rows))
    for begin, end in chunks:
        chosen = order[begin:end]
        users, index = np.unique(user_index[chosen], return_inverse=True)
        batch = collator(rows[chosen], np.arange(len(chosen))).to(device)
        with torch.no_grad():
            features = model.backbone(batch)
            threshold = None if model.tie_threshold is None else model.tie_threshold()
        owner = torch.from_numpy(index).to(device)
        chunk = Chunk(model.head, features, batch, owner, len(users), threshold)
        yield torch.from_numpy(users), chunk
    model.eval()


def pairs_per_chunk(head: Head, collator: Collator, rows: np.ndarray) -> int:
    """Comparisons whose hidden states, with what the head makes of prompts, fill about FLOATS_PER_CHUNK.

    PAIRS_PER_CHUNK at most.
    """
    data, store = collator.data, collator.response_store
    if data.response_vectors is not None:
        width, longest = data.response_vectors.shape[1], 1
    elif store is not None:
        pairs = np.stack([data.comparisons[side][rows] for side in ("a", "b")])
        width, longest = store.width, int(store.lengths_of(pairs).max(initial=1))
    else:
        return PAIRS_PER_FORWARD
    floats = 2 * longest * width
    if "prompt" in head.needs:
        # K maps of each prompt; where every position of it is read, for each start of the solver by itself.
        floats += head.num_prototypes * width * _prompt_copies(head, collator, rows)
    return max(1, min(PAIRS_PER_CHUNK, FLOATS_PER_CHUNK // floats))


def _prompt_copies(head: Head, collator: Collator, rows: np.ndarray) -> int:
    """Positions whose K maps a comparison holds at once."""
    store = collator.prompt_store
    if "prompt_tokens" not in head.needs or store is None:
        return 1
    prompts = collator.data.comparisons["a"][rows]
    if collator.encoding == "separate":
        prompts = collator.data.response_prompt[prompts]
    return 2 * (head.num_prototypes + 1) * int(store.lengths_of(prompts).max(initial=1))


def _chunks(sorted_users: np.ndarray, num_pairs: int) -> list[tuple[int, int]]:
    """Runs of whole users, of about `num_pairs` comparisons each."""
    if len(sorted_users) == 0:
        return []
    ends = np.append(np.flatnonzero(np.diff(sorted_users)) + 1, len(sorted_users))
    chunks, begin = [], 0
    for end, following in zip(ends, np.append(ends[1:], math.inf), strict=True):
        if following - begin > num_pairs:
            chunks.append((begin, int(end)))
            begin = int(end)
    return chunks


class Chunk(NamedTuple):
    """Comparisons of some users with what a head reads of them."""

    head: Head
    features: Features
    batch: Batch
    owner: Int[Tensor, "n"]
    num_users: int
    threshold: Float[Tensor, "1"] | None

    def comparisons(self, log_reliability: Float[Tensor, "U"] | None = None) -> UserComparisons:
        """The comparisons, whose users have this reliability."""
        factor = None if log_reliability is None else log_reliability.exp()
        return UserComparisons(self.owner, self.batch.facts(), self.threshold, factor)

    def margins(self, logits: Float[Tensor, "U K"]) -> Float[Tensor, "B T"]:
        """Margins at these logits, before any factor; of a head without points, whatever the logits are."""
        user = user_state(self.batch)
        if self.head.has_points:
            point = self.head.mixture_weights(UserState(logits))
            user = UserState(mixture=point[self.owner])
        return self.head(self.features, user).margin


def fit_chunk(
    chunk: Chunk,
    loss: PreferenceLoss,
    prior: UserPrior,
    solver: Solver,
    begins: Float[Tensor, "U K"],
) -> FittedUsers:
    """Fit the users of a chunk, on its device; their logits as they begin, where the head reads none."""
    variance, reads_logits = prior.reliability_variance, "logits" in chunk.head.needs
    logits, r = begins, None
    for _ in range(1 if variance is None or not reads_logits else NUM_TURNS):
        if reads_logits:
            logits = _fit_points(chunk, chunk.comparisons(r), loss, prior, solver, begins)
        if variance is not None:
            with torch.no_grad():
                margin = chunk.margins(logits)
            r = most_likely_reliability(
                margin, chunk.comparisons(), chunk.num_users, loss=loss, variance=variance
            )
    return FittedUsers(logits, r)


def _fit_points(
    chunk: Chunk,
    comparisons: UserComparisons,
    loss: PreferenceLoss,
    prior: UserPrior,
    solver: Solver,
    begins: Float[Tensor, "U K"],
) -> Float[Tensor, "U K"]:
    head, features, _, owner, num_users, _ = chunk
    if isinstance(prior, DirectionPrior):
        with torch.no_grad():
            return fit_directions(head, features, comparisons, num_users, prior=prior, loss=loss)
    prior = prior.to(owner.device)
    with torch.no_grad():
        statistics = head.statistics(features)
    if statistics is not None and loss.kind in SHAPES and solver in ("auto", "newton"):
        return solve(statistics, comparisons, num_users, prior, loss)
    losses = losses_of(margins_of(head, features, statistics, owner), loss, comparisons)
    if solver == "reference":
        return reference_adamw(losses, owner, begins)
    return adam(losses, owner, num_users, prior, head.temperature)
