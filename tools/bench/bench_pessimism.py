"""Best of n with a pessimistic reward: regret of the chosen response, mean reward against mean less c deviations.

    python tools/bench/bench_pessimism.py [--users 300] [--comparisons 5] [--prompts 40] [--noise 1.0]

Planted worlds, as in `bench_posterior.py`, with a noisy backbone: the features that the reward reads are the true ones
plus noise whose size differs from response to response (Student's t of 3 degrees of freedom), in adaptation and in use.
For n = 2 to 64 candidates per prompt, the one with the largest score is chosen; its regret is the true reward of the
best candidate less its own, in standard deviations of true rewards. Differences are paired by user, with 95% intervals.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pal_ds.adaptation.blocks import UserComparisons
from pal_ds.adaptation.newton import solve
from pal_ds.adaptation.user_posteriors import posteriors_by_statistics
from pal_ds.heads import Features, UserState
from pal_ds.inference.posterior_file import REACH, axes_of
from pal_ds.losses import PairFacts, PreferenceLoss
from tools.bench.environment import describe_environment
from tools.bench.planted_users import HEADS, HIDDEN, Planted, make_world

LOSS = PreferenceLoss("logistic", "last")
SIZES = (2, 4, 8, 16, 32, 64)
PESSIMISM = (0.5, 1.0, 2.0)


def noisy(states: Tensor, noise: float) -> Tensor:
    """One size of the noise for each response."""
    heavy = torch.distributions.StudentT(3.0).sample(states.shape[:-1]).abs().unsqueeze(-1)
    return states + noise * states.std() * heavy * torch.randn_like(states)


def fitted(world: Planted, count: int, noise: float) -> tuple[Tensor, Tensor]:
    """(points, covariances) of the users after `count` comparisons, through the noisy backbone."""
    features, owner = world.pairs(count)
    chance = torch.sigmoid(world.margins(features, world.truth[owner]))
    label = torch.where(torch.rand(len(owner)) < chance, 1, -1)
    start, ones = torch.zeros(len(owner), dtype=torch.int64), torch.ones(len(owner))
    facts = PairFacts(label, start, start + 1, 0 * ones, ones)
    statistics = world.head.statistics(features._replace(response=noisy(features.response, noise)))
    assert statistics is not None, "the heads of this bench have statistics"
    comparisons, num_users = UserComparisons(owner, facts), len(world.truth)
    logits = solve(statistics, comparisons, num_users, world.prior, LOSS)
    covariance = torch.zeros(num_users, logits.shape[1], logits.shape[1])
    for users, part in posteriors_by_statistics(statistics, comparisons, logits, world.prior, LOSS):
        covariance[users] = part.covariance
    return torch.softmax(logits / statistics.temperature, 1), covariance


def rewards(world: Planted, states: Tensor, point: Tensor) -> Tensor:
    """Rewards [U, n] of candidates [U, n, H] of one prompt each, for the users at these points."""
    num_users, size, _ = states.shape
    index = torch.arange(num_users * size).view(num_users, size)
    prompt = torch.zeros(1, 1, HIDDEN)
    features = Features(states.flatten(0, 1)[:, None], index, prompt, torch.zeros_like(index))
    return world.head.reward(features, UserState(None, None, point))[..., 0]


def measure(
    world: Planted, options: argparse.Namespace
) -> dict[str, dict[int, tuple[float, float]]]:
    """By rule and n: mean regret and half of its 95% interval; of the rules, of the difference from the mean's."""
    torch.manual_seed(1)
    point, covariance = fitted(world, options.comparisons, options.noise)
    axes = axes_of(covariance)
    regrets: dict[str, dict[int, list[Tensor]]] = {}
    for _ in range(options.prompts):
        states = world.stretch * torch.randn(len(point), max(SIZES), HIDDEN)
        seen = noisy(states, options.noise)
        truth, mean = rewards(world, states, world.truth), rewards(world, seen, point)
        variance = torch.zeros_like(mean)
        for axis in axes.unbind(1):
            far = REACH * axis
            up, down = (rewards(world, seen, point + away) for away in (far, -far))
            variance += ((up - down) / (2 * REACH)).square()
        for c in (0.0, *PESSIMISM):
            score = mean - c * variance.sqrt()
            for size in SIZES:
                best = score[:, :size].argmax(1, keepdim=True)
                lost = truth[:, :size].max(1).values - truth.gather(1, best)[:, 0]
                name = "mean" if c == 0 else f"mean - {c:g} std"
                regrets.setdefault(name, {}).setdefault(size, []).append(lost / truth.std())
    result: dict[str, dict[int, tuple[float, float]]] = {}
    for name, by_size in regrets.items():
        for size, parts in by_size.items():
            own = torch.stack(parts).mean(0)
            if name != "mean":
                own = own - torch.stack(regrets["mean"][size]).mean(0)
            half = 1.96 * float(own.std()) / len(own) ** 0.5
            result.setdefault(name, {})[size] = float(own.mean()), half
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--users", type=int, default=300)
    parser.add_argument("--comparisons", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--noise", type=float, default=1.0, help="of features, in their own scale")
    parser.add_argument("--num_prototypes", type=int, default=5)
    parser.add_argument(
        "--heads", nargs="+", choices=HEADS, default=["LoRe", "Pw distance", "Pw cosine"]
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"environment": describe_environment()}, indent=1))
    for name in options.heads:
        world = make_world(name, options.num_prototypes, options.users, "dirichlet", 2.0)
        print(f"{name}, {options.comparisons} comparisons, noise {options.noise:g}: regret")
        for rule, by_size in measure(world, options).items():
            sign = "" if rule == "mean" else "+"
            cells = (
                f"n {size}: {mean:{sign}.3f} +-{half:.3f}" for size, (mean, half) in by_size.items()
            )
            print(f"  {rule:15s} " + ", ".join(cells), flush=True)


if __name__ == "__main__":
    main()
