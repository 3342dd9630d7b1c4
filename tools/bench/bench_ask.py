"""Seconds that `ask` takes to choose, for many users and candidates, on one core.

    python tools/bench/bench_ask.py [--users 10000] [--candidates 1000] [--num 10] [--num_prototypes 8] [--heads ...]

From statistics in memory to the chosen candidates: what a backbone costs per text comes on top and is the same for
every user. Users' points and covariances are drawn as `bench_posterior.py` fits them after a few comparisons.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pal_ds.adaptation.chooser import Chooser, Users
from pal_ds.adaptation.strategies import STRATEGIES, Prompts
from pal_ds.inference.rewards_at import ScoredPairs, table_of
from tools.bench.environment import describe_environment
from tools.bench.planted_users import HEADS, make_world

FLOOR = 60.0
"""Seconds for 10,000 users and 1,000 candidates."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--num", type=int, default=10, help="chosen for each user")
    parser.add_argument("--num_prototypes", type=int, default=8)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"environment": describe_environment()}, indent=1))
    num_users, width = options.users, options.num_prototypes
    for name in options.heads:
        world = make_world(name, width, num_users, "dirichlet", 2.0)
        features, _ = world._replace(truth=world.truth[:1]).pairs(options.candidates)
        sides = features.response_index
        last = torch.zeros(2 * len(sides), dtype=torch.int64)
        one = features._replace(
            response_index=torch.arange(len(last))[:, None],
            prompt_index=torch.arange(len(sides)).repeat_interleave(2)[:, None],
        )
        table = table_of(world.head, [(one, last)])
        spread = 0.1 * torch.randn(num_users, width, width)
        spread = spread - spread.mean(1, keepdim=True)
        users = Users(
            [f"user {number}" for number in range(num_users)],
            world.truth,
            spread @ spread.mT,
        )
        prompts = Prompts.of(torch.arange(len(sides)).repeat_interleave(2))
        free = torch.ones(1, len(sides), dtype=torch.bool)
        for strategy in STRATEGIES:
            chooser = Chooser(strategy, options.num, 0, ScoredPairs(table, sides), prompts)
            begin = time.perf_counter()
            for first in range(0, num_users, chooser.users_at_once):
                part = slice(first, first + chooser.users_at_once)
                some = users.some(part)
                chooser.choose(some, free.expand(len(some.ids), -1))
            seconds = time.perf_counter() - begin
            passed = "reached" if seconds <= FLOOR else "MISSED"
            print(
                f"{name}, {strategy}: {num_users} users x {len(sides)} candidates, {options.num} each: "
                f"{seconds:.1f} s (at most {FLOOR:.0f} s: {passed})",
                flush=True,
            )


if __name__ == "__main__":
    main()
