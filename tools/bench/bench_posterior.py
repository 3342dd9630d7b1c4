"""Posterior of new users: do 90% intervals of margins hold the true margin in 90% of cases, and what do they cost?

    python tools/bench/bench_posterior.py [--users 400] [--heads NAME ...] [--population dirichlet | clusters]
        [--num_prototypes 8] [--scales 0.5 2] [--out FILE]
    python tools/bench/bench_posterior.py --run_dir RUN [--num_draws 5]

Without a run: planted worlds, as in `bench_adapt.py`, but at the last position alone. A head with random prototypes is
the truth, 1,000 users of a population make the prior, and new users of the same population compare responses by the
truth's own log-odds; `scale` is the standard deviation of margins over pairs and users. Per k = 2, 5, 10, 50
comparisons: the share of held-out pairs whose true margin lies within 1.645 standard deviations of the fitted one, by
the delta method in the point. Beside it: the same from Laplace's Gaussian alone through the softmax's Jacobian, the
root of the mean squared error with the mean standard deviation (which should agree), and users per second of
processor time.
With a run: its held-out users, whose true margins are the log-odds of `probability` in the records (Synthetic,
VectorWorld), fitted from k of their `unseen_train` pairs, judged on `unseen_test`; there the head's own error counts.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pal_ds.adaptation.blocks import UserComparisons, blocks
from pal_ds.adaptation.gradient import adam, losses_of, margins_of
from pal_ds.adaptation.likelihoods import ByLosses, ByStatistics
from pal_ds.adaptation.newton import solve
from pal_ds.adaptation.objective import shape_of
from pal_ds.adaptation.posterior import Posterior, Simplex, posterior_of
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.adaptation.user_posteriors import posteriors_by_statistics
from pal_ds.heads import Features, Head, Lore, PalA, PalB, UserState
from pal_ds.losses import PairFacts, PreferenceLoss
from pal_ds.users import UserTable
from tools.bench.environment import describe_environment

HIDDEN = 32
NUM_TEST = 40
COUNTS = (2, 5, 10, 50)
WIDTH = 1.6449
"""Standard deviations on either side of a 90% interval."""
HEADS: dict[str, Callable[[int], Head]] = {
    "LoRe": lambda k: Lore(HIDDEN, k),
    "Pw distance": lambda k: PalA(HIDDEN, k, HIDDEN, 1, residual=False, user_point="Pw"),
    "Pw cosine": lambda k: PalA(
        HIDDEN, k, HIDDEN, 1, residual=False, user_point="Pw", similarity="cosine"
    ),
    "PAL-B": lambda k: PalB(HIDDEN, k, HIDDEN, 1),
    "f(Pw) distance": lambda k: PalA(HIDDEN, k, HIDDEN, 3),
}
LOSS = PreferenceLoss("logistic", "last")


def logits_of(population: str, num_prototypes: int, num_users: int) -> Tensor:
    """[num_users, K]"""
    if population == "clusters":
        draw = torch.Generator().manual_seed(7)
        centres = 2 * torch.randn(6, num_prototypes, generator=draw)
        own = centres[torch.randint(6, (num_users,))]
        return own + 0.3 * torch.randn_like(own)
    dirichlet = torch.distributions.Dirichlet(torch.full((num_prototypes,), 0.5))
    return dirichlet.sample((num_users,)).clamp(min=1e-3).log()


class World(NamedTuple):
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
) -> World:
    torch.manual_seed(0)
    head = HEADS[name](num_prototypes).eval().requires_grad_(False)
    seen = UserTable(num_prototypes, [f"seen {number}" for number in range(1000)])
    seen.logits.copy_(logits_of(population, num_prototypes, 1000))
    truth = torch.softmax(logits_of(population, num_prototypes, num_users), 1)
    world = World(head, LogitPrior.of(seen), truth, 1.0)
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


class Fit(NamedTuple):
    """Users who were fitted from k comparisons."""

    logits: Tensor
    posterior: Posterior
    laplace: Tensor
    """Covariance of the point by Laplace's Gaussian alone, [U, K, K]."""
    users_per_second: float


def fit(world: World, count: int) -> Fit:
    features, owner = world.pairs(count)
    probability = torch.sigmoid(world.margins(features, world.truth[owner]))
    label = torch.where(torch.rand(len(owner)) < probability, 1, -1)
    start = torch.zeros(len(owner), dtype=torch.int64)
    facts = PairFacts(label, start, start + 1, torch.zeros(len(owner)), torch.ones(len(owner)))
    comparisons, prior = UserComparisons(owner, facts), world.prior
    statistics, num_users = world.head.statistics(features), len(world.truth)
    if statistics is None:
        losses = losses_of(margins_of(world.head, features, None, owner), LOSS, comparisons)
        tau = world.head.temperature
        logits = adam(losses, owner, num_users, prior, tau)
        likelihood = ByLosses(losses, owner)
        begin = time.process_time()
        posterior = posterior_of(likelihood, logits, prior, Simplex(tau))
        seconds, curvature = time.process_time() - begin, likelihood.curvature(logits)
    else:
        tau = statistics.temperature
        logits = solve(statistics, comparisons, num_users, prior, LOSS)
        begin = time.process_time()
        parts = posteriors_by_statistics(statistics, comparisons, logits, prior, LOSS)
        seconds = time.process_time() - begin
        order = torch.cat([users for users, _ in parts]).argsort()
        posterior = Posterior(
            *(torch.cat(part)[order] for part in zip(*(p for _, p in parts), strict=True))
        )
        curvature = torch.empty(num_users, *posterior.covariance.shape[1:])
        for block in blocks(statistics, comparisons, num_users, LOSS.token_weighting):
            likelihood = ByStatistics(block, statistics, shape_of(LOSS, None), prior)
            curvature[block.users] = likelihood.curvature(logits[block.users])
    point = torch.softmax(logits / tau, 1)
    jacobian = (torch.diag_embed(point) - point[:, :, None] * point[:, None]) / tau
    values, vectors = torch.linalg.eigh(curvature + prior.precisions[0])
    inverse = (vectors / values.clamp(min=1e-3)[:, None]) @ vectors.mT
    return Fit(logits, posterior, jacobian @ inverse @ jacobian, num_users / seconds)


def measure(world: World, count: int) -> dict[str, float]:
    torch.manual_seed(count)
    fitted = fit(world, count)
    features, owner = world.pairs(NUM_TEST)
    point = torch.softmax(fitted.logits / world.head.temperature, 1)
    leaf = point[owner].requires_grad_()
    with torch.enable_grad():
        margin = world.margins(features, leaf)
        (slope,) = torch.autograd.grad(margin.sum(), leaf)
    error = (margin.detach() - world.margins(features, world.truth[owner])).abs()

    def deviation(covariance: Tensor) -> Tensor:
        return ((covariance[owner] @ slope[:, :, None])[..., 0] * slope).sum(1).clamp(min=0).sqrt()

    own, laplace = deviation(fitted.posterior.covariance), deviation(fitted.laplace)
    return {
        "num_comparisons": count,
        "coverage": float((error <= WIDTH * own).double().mean()),
        "laplace_coverage": float((error <= WIDTH * laplace).double().mean()),
        "root_mean_square_error": float(error.square().mean().sqrt()),
        "root_mean_square_std": float(own.square().mean().sqrt()),
        "effective_draws": float(fitted.posterior.effective_draws.median()),
        "users_per_second": fitted.users_per_second,
    }


def show(title: str, rows: list[dict[str, float]]) -> None:
    print(title)
    for row in rows:
        inside = 0.85 <= row["coverage"] <= 0.95
        print(
            f"  k {row['num_comparisons']:3.0f}: coverage {100 * row['coverage']:.1f}%"
            + ("" if inside else " OUTSIDE 85 TO 95%")
            + "".join(
                f", {key.replace('_', ' ')} {value:.3g}" for key, value in list(row.items())[2:]
            ),
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--users", type=int, default=400)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument(
        "--population",
        choices=("dirichlet", "clusters"),
        nargs="+",
        default=["dirichlet", "clusters"],
    )
    parser.add_argument("--num_prototypes", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 2.0, 5.0])
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    environment = describe_environment()
    print(json.dumps({"environment": environment}, indent=1))
    results = []
    for population in options.population:
        for num_prototypes in options.num_prototypes:
            for name in options.heads:
                for scale in options.scales:
                    world = make_world(name, num_prototypes, options.users, population, scale)
                    rows = [measure(world, count) for count in COUNTS]
                    title = f"{name}, K {num_prototypes}, {population}, margins of scale {scale:g}"
                    show(title, rows)
                    results.append({"world": title, "rows": rows})
    coverage = np.array([row["coverage"] for result in results for row in result["rows"]])
    print(
        f"{np.mean((coverage >= 0.85) & (coverage <= 0.95)):.0%} of {len(coverage)} cells within 85 to 95%"
    )
    if options.out is not None:
        options.out.write_text(
            json.dumps({"environment": environment, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
