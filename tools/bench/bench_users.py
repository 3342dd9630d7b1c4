"""The user table by number of users: one update, one whole training step, and one parameter per user as the past.

    python tools/bench/bench_users.py [--rounds 15] [--users 10000000] [--clock cpu] [--stored]

Each row first holds its contestants' numbers against each other, in this process. Contestants run interleaved; a row
gives the median time (20th to 80th percentile) and, against its first contestant, the ratio of medians with a 95%
bootstrap interval. Rows of a table are drawn at random from all of it, never twice in a thousand updates: a large
table is met in memory, not in a cache, and every page of it was written before. `--stored` also makes, saves, loads
and searches a table of that size, once each. Needs 3 GB, and 2 GB of disk with `--stored`.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pal_ds.backbones.given import GivenStates
from pal_ds.config.run_config import OptimConfig, TrainConfig
from pal_ds.data.collator import Collator
from pal_ds.data.loader import UpdateSource
from pal_ds.data.plan import UpdatePlan
from pal_ds.data.tables import COMPARISON_DTYPE, PreparedData
from pal_ds.distributed.world import leave
from pal_ds.engine.ds_config import ds_config_of
from pal_ds.engine.guard import UpdateGuard
from pal_ds.engine.process_group import distributed
from pal_ds.engine.step import Stepper
from pal_ds.engine.training_engine import start_training_engine
from pal_ds.heads import PalA
from pal_ds.losses import PreferenceLoss
from pal_ds.model import RewardModel
from pal_ds.users import UserTable
from pal_ds.users.ids import UserIds
from pal_ds.users.rows import UserRows
from tools.bench.environment import describe_environment
from tools.bench.interleaved import row

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
K, FEW, RATE = 8, 1000, 0.05
DRAWN = 2**19
"""Rows that a contestant goes through before it meets one again: 55 MB of records, more than caches hold."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=15, help="of all contestants of a row")
    parser.add_argument("--users", type=int, default=10_000_000, help="of the largest table")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: beside other work, one thread"
    )
    parser.add_argument("--stored", action="store_true", help="also make, save and load it")
    options = parser.parse_args()
    torch.manual_seed(0)
    about = {
        "environment": describe_environment(),
        "rounds": options.rounds,
        "clock": options.clock,
    }
    print(json.dumps(about, indent=1))
    figures: dict[str, Any] = {}
    for num_touched in (32, 1000):
        figures |= update_rows(options, num_touched)
    figures |= parameter_row(options)
    figures |= step_row(options)
    if options.stored:
        figures |= stored(options.users)
    print(json.dumps({"median_seconds": figures}, indent=1))


def table_of(num_users: int) -> UserTable:
    """A table of so many users, all alike; who they are takes no part in an update."""
    table = UserTable(K)
    table._rows = UserRows(num_users, K)
    table.logits.fill_(0.5)
    return table


def draws(num_users: int, num_touched: int) -> Iterator[Tensor]:
    """Distinct random rows for one update after another, without end."""
    generator = np.random.default_rng(0)
    sets = [
        torch.from_numpy(generator.choice(num_users, num_touched, replace=False))
        for _ in range(DRAWN // num_touched)
    ]
    return itertools.cycle(sets)


def update_rows(options: argparse.Namespace, num_touched: int) -> dict[str, Any]:
    """The update alone, then with the reading of the rows that precedes it in a step."""
    tables = {f"{n:,} users": table_of(n) for n in (options.users, 100_000, FEW)}
    drawn = {name: draws(len(table._rows), num_touched) for name, table in tables.items()}
    gradients = torch.randn(num_touched, K)
    expected = None
    for name, table in tables.items():
        rows = next(drawn[name])
        table.apply(rows, gradients, None, RATE)
        moved = table.leaf(rows).detach()
        # The same users, wherever they lie. Rows are summed in the order of their numbers, hence distinct here.
        expected = moved if expected is None else expected
        assert torch.equal(moved, expected), f"{name} differs"

    def update(name: str, *, read: bool) -> list[Tensor]:
        rows = next(drawn[name])
        if read:
            tables[name].fetch(rows).leaf(rows)
        tables[name].apply(rows, gradients, None, RATE)
        return []

    results = {}
    for read, words in ((False, "update"), (True, "read and update")):
        contestants = {name: partial(update, name, read=read) for name in tables}
        title = f"{words}, {num_touched} users touched, K {K}, CPU"
        results[title] = row(title, contestants, options.rounds, CLOCKS[options.clock])
    return results


def parameter_row(options: argparse.Namespace) -> dict[str, Any]:
    """100,000 users: the table against a ParameterDict under torch's Adam, which skips who has no gradient."""
    num_users, num_touched = 100_000, 32
    table = table_of(num_users)
    parameters = torch.nn.ParameterDict(
        {str(user): torch.nn.Parameter(torch.full((K,), 0.5)) for user in range(num_users)}
    )
    named = [parameters[str(user)] for user in range(num_users)]
    adam = torch.optim.Adam(parameters.parameters(), lr=RATE)
    gradients = torch.randn(num_touched, K)
    drawn = draws(num_users, num_touched)

    def by_parameters() -> list[Tensor]:
        for user, gradient in zip(next(drawn).tolist(), gradients, strict=True):
            named[user].grad = gradient
        adam.step()
        adam.zero_grad()
        return []

    def by_table() -> list[Tensor]:
        table.apply(next(drawn), gradients, None, RATE)
        return []

    rows = next(drawn)
    for _ in range(2):
        for user, gradient in zip(rows.tolist(), gradients, strict=True):
            named[user].grad = gradient
        adam.step()
        adam.zero_grad()
        table.apply(rows, gradients, None, RATE)
    wanted = torch.stack(named).detach()
    assert torch.allclose(table.logits, wanted, rtol=1e-5, atol=1e-6), "not the same Adam"
    title = f"step of {num_users:,} users, {num_touched} touched, K {K}, CPU"
    contestants = {"a parameter per user": by_parameters, "the table": by_table}
    return {title: row(title, contestants, options.rounds, CLOCKS[options.clock])}


def step_row(options: argparse.Namespace) -> dict[str, Any]:
    """Whole updates of a PAL-A on vectors: batch, forward, backward, the engine's step and the users'."""
    with distributed() as world:
        settings = TrainConfig(batch_pairs=256, micro_batch_pairs=256, ds_config="zero1")
        guard = UpdateGuard(settings, world)
        # The model's rate is 0, so that both contestants meet the same model in every update.
        optim = OptimConfig(learning_rate=0.0, schedule="constant", warmup_fraction=0.0)
        engine = start_training_engine(
            RewardModel(GivenStates(), PalA(256, num_prototypes=K)),
            optim,
            ds_config_of(settings, 1),
            guard,
        )
        data = vectors(num_comparisons=DRAWN, hidden=256)
        plan = UpdatePlan(
            np.arange(DRAWN), np.zeros(DRAWN, np.int64), 256, 0, "no hash", "comparison"
        )
        losses: dict[str, list[float]] = {}

        def contestant(num_users: int) -> Callable[[], list[Tensor]]:
            stepper = Stepper(
                engine=engine, users=table_of(num_users), loss=PreferenceLoss(), optim=optim,
                users_learning_rate=RATE, world=world, num_updates=10**9, seed=0,
                needs_users=True, guard=guard,
            )  # fmt: skip
            # A user of the data is a row of the table: all different in the large one.
            own = np.random.default_rng(1).integers(num_users, size=DRAWN)
            comparisons = data.comparisons.copy()
            comparisons["user"] = own
            collator = Collator(replace(data, comparisons=comparisons))
            source = UpdateSource(plan, collator, 0, 1, 256)
            numbers = itertools.count()
            name = f"{num_users:,} users"

            def step() -> list[Tensor]:
                update = next(numbers)
                inputs = source[update]
                stats = stepper.run(update, inputs.batches, inputs.runs, inputs.user_rows)
                if update == 0:
                    losses.setdefault("first", []).append(float(stats.loss_sum))
                return []

            contestants[name] = step
            return step

        contestants: dict[str, Callable[[], list[Tensor]]] = {}
        for num_users in (options.users, FEW):
            contestant(num_users)()
        one, other = losses["first"]
        assert abs(one - other) <= 1e-5 * abs(one), f"losses differ: {one} and {other}"
        title = f"whole step, PAL-A on vectors of 256, 256 pairs, K {K}, CPU"
        found = row(title, contestants, 2 * options.rounds, CLOCKS[options.clock])
        engine.destroy()
    return {title: found}


def vectors(num_comparisons: int, hidden: int) -> PreparedData:
    """Comparisons of 1,000 random vectors."""
    generator = np.random.default_rng(0)
    comparisons = np.zeros(num_comparisons, COMPARISON_DTYPE)
    for side in ("a", "b"):
        comparisons[side] = generator.integers(1000, size=num_comparisons)
    comparisons["label"] = 2 * generator.integers(2, size=num_comparisons) - 1
    states = generator.standard_normal((1000, hidden), np.float32)
    owners = np.zeros(1000, np.int64)
    return PreparedData(
        Path(),
        cast(Any, {"counts": {}}),
        comparisons,
        owners,
        [],
        np.zeros(0, bool),
        [],
        response_vectors=states,
    )


def stored(num_users: int) -> dict[str, Any]:
    """Seconds of what is done once: making a table, saving, loading and searching it."""
    found: dict[str, float] = {}

    def timed(name: str, do: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        made = do()
        found[name] = time.perf_counter() - begin
        print(f"{num_users:,} users: {name} {found[name]:.2f} s", flush=True)
        return made

    ids = timed("ids", lambda: UserIds.of(f"user-{row:08d}" for row in range(num_users)))
    table = timed("fresh table", lambda: UserTable(K, ids))
    with tempfile.TemporaryDirectory() as folder:
        timed("save", lambda: table.save(folder))
        logits = table.logits[::1000].clone()
        del table
        loaded = timed("load", lambda: UserTable.load(folder))
    assert torch.equal(loaded.logits[::1000], logits), "loaded another table than was saved"
    user_ids = [f"user-{row:08d}" for row in range(0, num_users, max(1, num_users // 1000))]
    timed("1,000 look-ups", lambda: loaded.rows(user_ids))
    return {"once": found}


if __name__ == "__main__":
    main()
    leave(0)
