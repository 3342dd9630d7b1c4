"""Logits of many new users at once by gradients of their comparisons' loss, for heads that no statistics sum up.

Two optimisers, both over all users side by side: Adam from several starts under a prior, and the reference's AdamW,
whose regulariser is that it stops early. Axes: S starts, U users, B comparisons, T positions, K prototypes.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pal_ds.adaptation.blocks import UserComparisons
from pal_ds.adaptation.prior import LogitPrior, mean_over_components
from pal_ds.distributed import phase
from pal_ds.heads.base import Features, Head, Placement, UserState
from pal_ds.heads.geometry import unit
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.heads.sufficient_statistics import MixtureStatistics, combine
from pal_ds.losses import PairFacts, PreferenceLoss

NUM_KEPT = 3
"""Starts that are followed, per user: those with the lowest objective."""
NUM_STEPS = 100
LEARNING_RATE = 0.1
REFERENCE_EPOCHS = 20
REFERENCE_LEARNING_RATE = 5e-3

Margins = Callable[[Float[Tensor, "S U K"], Int[Tensor, "b"]], Float[Tensor, "S b T"]]
"""Margins of the comparisons in these rows under the logits of their users, for each start."""

Losses = Callable[[Float[Tensor, "S U K"], Int[Tensor, "b"]], Float[Tensor, "S b"]]
"""Losses of the comparisons in these rows, likewise."""


def margins_of(
    head: Head, features: Features, statistics: MixtureStatistics | None, owner: Tensor
) -> Margins:
    """The cheapest way to a head's margins: by its statistics, by users' points, or by all of it each time."""
    if statistics is not None:
        return _by_statistics(statistics, owner)
    even = torch.full((len(owner), head.num_prototypes), 1 / head.num_prototypes).to(owner.device)
    vertices = UserState(None, None, torch.eye(head.num_prototypes, device=owner.device))
    with torch.no_grad():
        corners = head.locate(vertices)
        placement = None if corners is None else head.place(features, UserState(None, None, even))
    if corners is None or placement is None:
        return _by_head(head, features, owner)
    return _by_points(head, placement, corners.mean(0), owner)


def _by_statistics(statistics: MixtureStatistics, owner: Tensor) -> Margins:
    def margins(logits: Tensor, rows: Tensor) -> Tensor:
        part = statistics._replace(response_index=statistics.response_index[rows])
        mixture = part.points(logits).index_select(1, owner[rows])
        reward = torch.stack([part.reward(of_start) for of_start in mixture])
        return reward[:, :, 1] - reward[:, :, 0]

    return margins


def _by_points(head: Head, placement: Placement, centre: Tensor, owner: Tensor) -> Margins:
    """Responses are projected once; a step maps one point per user and start, and multiplies matrices.

    Squares are expanded around the mean point, as in `heads/sufficient_statistics.py`.
    """
    num_positions, scale = placement.response.shape[1], placement.scale
    response = placement.response.float()
    response = response - centre if scale is None else scale * unit(response)
    pairs = response[placement.response_index].flatten(1, 2)
    squares = pairs.square().sum(-1)

    def margins(logits: Tensor, rows: Tensor) -> Tensor:
        located = head.locate(UserState(logits.flatten(0, 1)))
        assert located is not None
        point = located.float() if scale is not None else located.float() - centre
        point = point.view(*logits.shape[:2], -1).index_select(1, owner[rows])
        form = point.square().sum(-1, keepdim=True)
        linear = torch.bmm(pairs[rows], point.permute(1, 2, 0)).permute(2, 0, 1)
        if scale is None:
            linear, form = squares[rows] + form - 2 * linear, torch.zeros_like(form)
        reward = combine(linear, form, "distance" if scale is None else "cosine")
        return reward[..., num_positions:] - reward[..., :num_positions]

    return margins


def _by_head(head: Head, features: Features, owner: Tensor) -> Margins:
    def margins(logits: Tensor, rows: Tensor) -> Tensor:
        num_starts, prompt_index = len(logits), features.prompt_index
        # One call for all starts: the responses are projected once, however many user points look at them.
        repeated = features._replace(
            response_index=features.response_index[rows].repeat(num_starts, 1),
            prompt_index=None if prompt_index is None else prompt_index[rows].repeat(num_starts, 1),
        )
        output = head(repeated, UserState(logits[:, owner[rows]].flatten(0, 1)))
        return output.margin.unflatten(0, (num_starts, len(rows)))

    return margins


def losses_of(margins: Margins, loss: PreferenceLoss, comparisons: UserComparisons) -> Losses:
    """The weighted losses of some comparisons, as a function of all users' logits."""
    facts = comparisons.facts

    def losses(logits: Float[Tensor, "S U K"], rows: Int[Tensor, "b"]) -> Float[Tensor, "S b"]:
        margin = margins(logits, rows)
        if comparisons.factor is not None:
            margin = margin * comparisons.factor[comparisons.user[rows]].unsqueeze(-1)
        margin = margin.flatten(0, 1)
        of_rows = PairFacts._make(
            None if part is None else part[rows].repeat(len(logits)) for part in facts
        )
        each = loss(
            margin,
            of_rows.label,
            of_rows.start,
            of_rows.end,
            of_rows.required_margin,
            target=of_rows.target,
            threshold=comparisons.threshold,
        )
        return (of_rows.weight * each).view(-1, len(rows))

    return losses


def adam(
    losses: Losses,
    owner: Int[Tensor, "B"],
    num_users: int,
    prior: LogitPrior,
    temperature: float,
) -> Float[Tensor, "U K"]:
    """Adam (arXiv 1412.6980) on the logits of all users side by side, each from the prior's NUM_KEPT best starts.

    NUM_STEPS steps at a rate that falls to 0 as a cosine does. The best of a user's ends is kept, or where the prior
    has clusters their mean mixture, weighted by the objective; `temperature` is the tau of mixtures. A user whose
    objective is no number gets the prior's mean.
    """
    everything = torch.arange(len(owner), device=owner.device)

    def likelihood(logits: Float[Tensor, "n U K"]) -> Float[Tensor, "n U"]:
        each = losses(logits, everything)
        return each.new_zeros(len(logits), num_users).index_add(1, owner, each)

    starts = prior.starts
    with torch.no_grad():
        likelihoods = torch.cat([likelihood(p.expand(1, num_users, -1)) for p in starts.points])
        cost = prior.penalty(starts.points[starts.point_index], starts.component)
    values = (likelihoods[starts.point_index] + cost[:, None]).nan_to_num(nan=torch.inf)
    order = torch.argsort(values, dim=0, stable=True)[:NUM_KEPT]
    component = starts.component[order]
    logits = starts.points[starts.point_index[order]].requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=LEARNING_RATE)
    for step in range(NUM_STEPS):
        phase.progress()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
        optimizer.zero_grad(set_to_none=True)
        (likelihood(logits) + prior.penalty(logits, component)).sum().backward(inputs=[logits])
        optimizer.step()
    with torch.no_grad():
        value = likelihood(logits) + prior.penalty(logits, component)
        # Comparisons whose features are no numbers say nothing.
        logits = torch.where(value.isnan().unsqueeze(-1), prior.mean, logits)
        value = value.nan_to_num(nan=torch.finfo(value.dtype).max)
        if prior.num_components > 1:
            lanes = logits.permute(2, 0, 1)
            return mean_over_components(prior, temperature, values, order, lanes, -value).T
        return logits[value.argmin(0), torch.arange(num_users, device=owner.device)]


def reference_adamw(
    losses: Losses, owner: Int[Tensor, "B"], initial: Float[Tensor, "U K"]
) -> Float[Tensor, "U K"]:
    """The PAL reference's way with a new user, for all users side by side: early-stopped AdamW without a prior.

    REFERENCE_EPOCHS passes over each user's comparisons in a fresh order, one comparison per step, rate
    REFERENCE_LEARNING_RATE, weight decay 0, moments and step counts per user.
    """
    order = torch.argsort(owner, stable=True)
    counts = torch.bincount(owner, minlength=len(initial))
    place = (
        torch.arange(len(order), device=owner.device) - (counts.cumsum(0) - counts)[owner[order]]
    )
    logits, first, second = initial.clone(), torch.zeros_like(initial), torch.zeros_like(initial)
    steps = torch.zeros_like(counts)
    for epoch in range(REFERENCE_EPOCHS):
        phase.progress()
        # A stream for each epoch: a user's order is then nobody else's matter, however many comparisons others have.
        generator = torch.Generator().manual_seed(epoch)
        noise = torch.rand(int(counts.max()), generator=generator).to(owner.device)[place]
        shuffled = order[torch.argsort(noise, stable=True)]
        shuffled = shuffled[torch.argsort(owner[shuffled], stable=True)]
        for turn in range(int(counts.max())):
            rows = shuffled[place == turn]
            users = owner[rows]
            leaf = logits.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(losses(leaf[None], rows).sum(), leaf)
            gradient, count = gradient[users], (steps[users] + 1).unsqueeze(-1)
            steps[users] += 1
            first[users] = first[users].lerp(gradient, 0.1)
            second[users] = second[users].lerp(gradient.square(), 0.001)
            mean = first[users] / (1 - 0.9**count)
            size = (second[users] / (1 - 0.999**count)).sqrt() + 1e-8
            logits[users] -= REFERENCE_LEARNING_RATE * mean / size
    return logits
