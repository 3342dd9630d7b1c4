"""Worlds with planted users, for benches of posteriors and of questions: a head of random weights is the truth."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pal_ds.adaptation.prior import LogitPrior
from pal_ds.heads import Features, Head, Lore, PalA, PalB, UserState
from pal_ds.users import UserTable

HIDDEN = 32
HEADS: dict[str, Callable[[int], Head]] = {
    "LoRe": lambda k: Lore(HIDDEN, k),
    "Pw distance": lambda k: PalA(HIDDEN, k, HIDDEN, 1, residual=False, user_point="Pw"),
    "Pw cosine": lambda k: PalA(
        HIDDEN, k, HIDDEN, 1, residual=False, user_point="Pw", similarity="cosine"
    ),
    "PAL-B": lambda k: PalB(HIDDEN, k, HIDDEN, 1),
    "f(Pw) distance": lambda k: PalA(HIDDEN, k, HIDDEN, 3),
}


def logits_of(population: str, num_prototypes: int, num_users: int) -> Tensor:
    """[num_users, K]"""
    if population == "clusters":
        draw = torch.Generator().manual_seed(7)
        centres = 2 * torch.randn(6, num_prototypes, generator=draw)
        own = centres[torch.randint(6, (num_users,))]
        return own + 0.3 * torch.randn_like(own)
    dirichlet = torch.distributions.Dirichlet(torch.full((num_prototypes,), 0.5))
    return dirichlet.sample((num_users,)).clamp(min=1e-3).log()


class Planted(NamedTuple):
    """New users of a known truth."""

    head: Head
    prior: LogitPrior
    truth: Tensor
    """Points [U, K]."""
    stretch: float
    """Factor of features, at which margins have the scale that was asked for."""

    def pairs(self, count: int) -> tuple[Features, Tensor]:
        """`count` pairs of each user and whose they are."""
        owner = torch.arange(len(self.truth)).repeat_interleave(count)
        index = torch.arange(2 * len(owner)).view(-1, 2)
        states = self.stretch * torch.randn(2 * len(owner), 1, HIDDEN)
        prompts = torch.arange(len(owner))[:, None].expand(-1, 2)
        return Features(states, index, torch.randn(len(owner), 1, HIDDEN), prompts), owner

    def margins(self, features: Features, point: Tensor) -> Tensor:
        reward = self.head.reward(features, UserState(None, None, point))[..., 0]
        return reward[:, 1] - reward[:, 0]


def make_world(
    name: str, num_prototypes: int, num_users: int, population: str, scale: float
) -> Planted:
    torch.manual_seed(0)
    head = HEADS[name](num_prototypes).eval().requires_grad_(False)
    seen = UserTable(num_prototypes, [f"seen {number}" for number in range(1000)])
    seen.logits.copy_(logits_of(population, num_prototypes, 1000))
    truth = torch.softmax(logits_of(population, num_prototypes, num_users), 1)
    world = Planted(head, LogitPrior.of(seen), truth, 1.0)
    for _ in range(4):
        # Distances and projectors are not linear in the scale: a few steps of a fixed-point iteration.
        features, owner = world.pairs(20)
        spread = float(world.margins(features, truth[owner]).std())
        by_cosine = getattr(head, "log_scale", None)
        if by_cosine is not None:
            by_cosine += math.log(scale / spread)
        else:
            world = world._replace(stretch=world.stretch * scale / spread)
            prototypes = getattr(head, "prototypes", None)
            if prototypes is not None:
                prototypes.mul_(scale / spread)
    return world
