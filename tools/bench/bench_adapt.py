"""Localising new users: users per second on one core, and accuracy against the reference's optimiser.

    python tools/bench/bench_adapt.py [--rounds 7] [--users 4000] [--comparisons 10] [--heads NAME ...]
        [--population dirichlet | clusters] [--out FILE]

A synthetic world: a head with random prototypes and maps is the truth, users' mixtures are Dirichlet(1/2), or lie close
to NUM_CLUSTERS points, choices follow the truth's own log-odds at the last position, so that the best possible accuracy
is known. Each user has 10 comparisons (last position, or windows of 40 whose earlier rewards are noisier) and 40
held-out ones. Per head: first the held-out accuracy of this solver, of the same under a prior without clusters, and of
the reference's optimiser (AdamW, 20 epochs, rate 5e-3, one comparison per step, from N(0, 1) as there and from the
population's mean), on the same statistics; a row whose accuracy is more than 0.1 point below is named so. Then
interleaved rounds, on one thread:
    solve       from statistics to logits
    statistics  hidden states to statistics, the head's own f and maps included (H = d = 64), without a backbone
    both        the one after the other
    reference   the reference's optimiser from the same statistics, vectorised over users (the third solver)
Seconds are processor time. `f(Pw)` has no statistics: Adam by users' points, from projected responses, with the MLP f
on users. What a backbone costs per text comes on top of every row and is the same for all.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pal_ds.adaptation.blocks import UserComparisons
from pal_ds.adaptation.gradient import adam, losses_of, margins_of, reference_adamw
from pal_ds.adaptation.newton import solve
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.heads import Features, Head, PalA, PalB, UserState
from pal_ds.heads.sufficient_statistics import MixtureStatistics
from pal_ds.losses import PairFacts, PreferenceLoss
from pal_ds.users import UserTable
from tools.bench.environment import describe_environment
from tools.bench.interleaved import ratio

HIDDEN = 64
WINDOW = 40
NUM_TEST = 40
SCALE, COSINE_SCALE = 6.0, 40.0
"""Of states and prototypes, and of cosines: choices that are seldom a matter of luck."""
NUM_CLUSTERS = 6
CLUSTER_SPREAD = 0.3
"""Of the logits in a cluster, standard deviation."""
FLOORS = {1: 2e4, WINDOW: 5e2}
WORST_LOSS = 0.1
HEADS: dict[str, Callable[[int], Head]] = {
    "Pw distance": lambda k: PalA(HIDDEN, k, HIDDEN, 1, residual=False, user_point="Pw"),
    "f(P)w distance": lambda k: PalA(HIDDEN, k, HIDDEN, 3, user_point="f(P)w"),
    "Pw cosine": lambda k: PalA(
        HIDDEN, k, HIDDEN, 1, residual=False, user_point="Pw", similarity="cosine"
    ),
    "PAL-B": lambda k: PalB(HIDDEN, k, HIDDEN, 1),
    "f(Pw) distance": lambda k: PalA(HIDDEN, k, HIDDEN, 3),
}


class World(NamedTuple):
    """New users of a known truth: comparisons to fit from, and to be tested on."""

    head: Head
    features: Features
    owner: Tensor
    label: Tensor
    test_features: Features
    test_owner: Tensor
    test_probability: Tensor
    truth: Tensor
    prior: LogitPrior


def mixtures_of(population: str, num_prototypes: int, num_users: int) -> Tensor:
    """[num_users, K]"""
    dirichlet = torch.distributions.Dirichlet(torch.full((num_prototypes,), 0.5))
    if population == "dirichlet":
        return dirichlet.sample((num_users,))
    draw = torch.Generator().manual_seed(7)
    centres = torch.randn(NUM_CLUSTERS, num_prototypes, generator=draw).mul(2)
    own = centres[torch.randint(NUM_CLUSTERS, (num_users,))]
    return torch.softmax(own + CLUSTER_SPREAD * torch.randn_like(own), 1)


def make_world(
    name: str, num_prototypes: int, length: int, users: int, comparisons: int, population: str
) -> World:
    torch.manual_seed(0)
    head = HEADS[name](num_prototypes).eval().requires_grad_(False)
    for key, parameter in head.named_parameters():
        if key == "prototypes":
            parameter.mul_(SCALE)
        elif key == "log_scale":
            parameter.fill_(math.log(COSINE_SCALE))
    seen = UserTable(num_prototypes, [f"seen {number}" for number in range(1000)])
    # The run's own users, of whom the prior is made: logits as training leaves them, bounded.
    seen.logits.copy_(mixtures_of(population, num_prototypes, 1000).clamp(min=0.02).log())
    truth = mixtures_of(population, num_prototypes, users)

    def draw(count: int, positions: int) -> tuple[Features, Tensor, Tensor]:
        owner = torch.arange(users).repeat_interleave(count)
        num_pairs = len(owner)
        last = SCALE * torch.randn(2 * num_pairs, 1, HIDDEN)
        # A response is judged by its end; what precedes tells less the earlier it is.
        noise = torch.linspace(1, 0, positions)[:, None]
        states = last + SCALE * noise * torch.randn(2 * num_pairs, positions, HIDDEN)
        prompts = torch.arange(num_pairs)[:, None].expand(-1, 2)
        features = Features(
            states,
            torch.arange(2 * num_pairs).view(-1, 2),
            torch.randn(num_pairs, 1, HIDDEN),
            prompts,
        )
        ends = features._replace(response=last)
        reward = head.reward(ends, UserState(None, None, truth[owner]))[..., 0]
        return features, owner, torch.sigmoid(reward[:, 1] - reward[:, 0])

    features, owner, probability = draw(comparisons, length)
    label = torch.where(torch.rand(len(owner)) < probability, 1, -1)
    test_features, test_owner, test_probability = draw(NUM_TEST, 1)
    rest = test_features, test_owner, test_probability, truth
    return World(head, features, owner, label, *rest, LogitPrior.of(seen))


class Fits:
    """The contestants on one world: each returns logits [U, K]."""

    def __init__(self, world: World) -> None:
        self.world, self.users = world, len(world.truth)
        length = world.features.response.shape[1]
        num_pairs = len(world.owner)
        weighting = "last" if length == 1 else "mean"
        self.loss = PreferenceLoss("logistic", weighting)
        start = torch.zeros(num_pairs, dtype=torch.int64)
        required, weight = torch.zeros(2, num_pairs)
        facts = PairFacts(world.label, start, start + length, required, weight + 1)
        self.comparisons = UserComparisons(world.owner, facts)
        self.statistics = self.make_statistics()
        margins = margins_of(world.head, world.features, self.statistics, world.owner)
        self.losses = losses_of(margins, self.loss, self.comparisons)

    def make_statistics(self) -> MixtureStatistics | None:
        return self.world.head.statistics(self.world.features)

    def ours(self, statistics: MixtureStatistics | None = None) -> Tensor:
        """The default solver."""
        prior, found = self.world.prior, statistics or self.statistics
        if found is None:
            return adam(
                self.losses, self.world.owner, self.users, prior, self.world.head.temperature
            )
        return solve(found, self.comparisons, self.users, prior, self.loss)

    def one_gaussian(self) -> Tensor:
        """The default solver under a prior without clusters."""
        prior = self.world.prior
        alone = LogitPrior(prior.means[:1], prior.precisions[:1], prior.heights[:1])
        if self.statistics is None:
            return adam(
                self.losses, self.world.owner, self.users, alone, self.world.head.temperature
            )
        return solve(self.statistics, self.comparisons, self.users, alone, self.loss)

    def both(self) -> Tensor:
        return self.ours(self.make_statistics())

    def reference(self, from_mean: bool = False) -> Tensor:
        draw = torch.Generator().manual_seed(1)
        begin = torch.randn(self.users, self.world.head.num_prototypes, generator=draw)
        mean = self.world.prior.mean.repeat(self.users, 1)
        return reference_adamw(self.losses, self.world.owner, mean if from_mean else begin)

    def accuracy(self, mixtures: Tensor) -> float:
        """Expected held-out accuracy under the truth's probabilities, percent."""
        world = self.world
        user = UserState(None, None, mixtures[world.test_owner])
        reward = world.head.reward(world.test_features, user)[..., 0]
        right = reward[:, 1] > reward[:, 0]
        p = world.test_probability
        return 100 * float(torch.where(right, p, 1 - p).double().mean())

    def accuracies(self) -> dict[str, float]:
        population = torch.softmax(self.world.prior.mean, 0).repeat(self.users, 1)
        found = {
            "ours": torch.softmax(self.ours(), 1),
            "one Gaussian": torch.softmax(self.one_gaussian(), 1),
            "reference": torch.softmax(self.reference(), 1),
            "reference from the mean": torch.softmax(self.reference(from_mean=True), 1),
            "population": population,
            "Bayes": self.world.truth,
        }
        return {name: self.accuracy(mixtures) for name, mixtures in found.items()}


def timed(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every run in every round, ABCABC; processor time, so that other work on the machine counts less."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin = time.process_time()
            run()
            if number:  # the first round warms up
                seconds[name].append(time.process_time() - begin)
    return seconds


def measure(name: str, num_prototypes: int, length: int, options: argparse.Namespace) -> dict:
    users = options.users if length == 1 else max(1, options.users // 20)
    # Accuracy wants many users; the fits of all of them are timed in one call each.
    world = make_world(
        name=name,
        num_prototypes=num_prototypes,
        length=length,
        users=users,
        comparisons=options.comparisons,
        population=options.population,
    )
    fits = Fits(world)
    row: dict[str, Any] = {
        "head": name,
        "num_prototypes": num_prototypes,
        "positions": length,
        "users": users,
        "clusters": world.prior.num_components - 1,
        "accuracy": fits.accuracies(),
    }
    row["points_above_reference"] = row["accuracy"]["ours"] - row["accuracy"]["reference"]
    runs: dict[str, Callable[[], object]] = {"solve": fits.ours, "reference": fits.reference}
    if fits.statistics is not None:
        runs |= {"statistics": fits.make_statistics, "both": fits.both}
    seconds = timed(runs, options.rounds if fits.statistics is not None else 2)
    for contestant, measured in seconds.items():
        slow, middle, fast = (users / float(q) for q in np.percentile(measured, (80, 50, 20)))
        row[contestant] = {"users_per_second": middle, "p20": slow, "p80": fast}
    row["speedup"] = ratio(seconds["reference"], seconds["solve"])
    row["floor"] = FLOORS[length]
    return row


def show(row: dict[str, Any]) -> None:
    accuracy, solve_rate = row["accuracy"], row["solve"]
    kept = row["points_above_reference"] >= -WORST_LOSS
    print(
        f"{row['head']}, K {row['num_prototypes']}, {row['positions']} positions, {row['users']} users, "
        f"{row['clusters']} clusters in the prior"
        + ("" if kept else ": LESS ACCURATE THAN THE REFERENCE'S OPTIMISER")
    )
    figures = ", ".join(f"{name} {value:.2f}" for name, value in accuracy.items())
    print(f"  held-out accuracy: {figures}; {row['points_above_reference']:+.2f} points")
    for name in ("solve", "statistics", "both", "reference"):
        if name in row:
            rate = row[name]
            print(
                f"  {name:10s} {rate['users_per_second']:10,.0f} users/s ({rate['p20']:,.0f} to {rate['p80']:,.0f})"
            )
    passed = "reached" if solve_rate["users_per_second"] >= row["floor"] else "MISSED"
    print("  {:.1f}x the reference's ({:.1f} to {:.1f})".format(*row["speedup"]), end="; ")
    print(f"floor {row['floor']:,.0f}: {passed}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--users", type=int, default=4000, help="a twentieth of them with windows")
    parser.add_argument("--comparisons", type=int, default=10)
    parser.add_argument("--population", choices=("dirichlet", "clusters"), default="dirichlet")
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--out", type=Path, help="JSON of all figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    environment = describe_environment()
    print(json.dumps({"environment": environment}, indent=1))
    rows = []
    for num_prototypes in (8, 2):
        for length in (1, WINDOW):
            for name in options.heads:
                rows.append(measure(name, num_prototypes, length, options))
                show(rows[-1])
    if options.out is not None:
        result = {"environment": environment, "rounds": options.rounds, "rows": rows}
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
