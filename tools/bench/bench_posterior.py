"""Posterior of new users: do 90% intervals of margins hold the true margin in 90% of cases, and what do they cost?

    python tools/bench/bench_posterior.py [--users 400] [--heads NAME ...] [--population dirichlet | clusters]
        [--num_prototypes 8] [--scales 0.5 2] [--out FILE]
    python tools/bench/bench_posterior.py --run_dir RUN [--num_draws 5]

Without a run: planted worlds, as in `bench_adapt.py`, but at the last position alone. A head with random prototypes is
the truth, 1,000 users of a population make the prior, and new users of the same population compare responses by the
truth's own log-odds; `scale` is the standard deviation of margins over pairs and users. Per k = 2, 5, 10, 50
comparisons: the share of held-out pairs whose true margin lies within 1.645 standard deviations of the fitted one, as
`score --std` has them. Beside it: the same from Laplace's Gaussian alone through the softmax's Jacobian, the
root of the mean squared error with the mean standard deviation (which should agree), and users per second of
processor time.
With a run: its held-out users, whose true margins are the log-odds of `probability` in the records (Synthetic,
VectorWorld), fitted from k of their `unseen_train` pairs, tested on `unseen_test`; there the head's own error counts.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pal_ds.adaptation.blocks import UserComparisons, blocks
from pal_ds.adaptation.chooser import margins_with_slopes
from pal_ds.adaptation.fit import UserPairs, fit_users
from pal_ds.adaptation.gradient import adam, losses_of, margins_of
from pal_ds.adaptation.likelihoods import ByLosses, ByStatistics
from pal_ds.adaptation.new_users import few_per_user
from pal_ds.adaptation.newton import solve
from pal_ds.adaptation.objective import shape_of
from pal_ds.adaptation.posterior import Posterior, Simplex, posterior_of
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.adaptation.user_posteriors import posterior_of_users, posteriors_by_statistics
from pal_ds.distributed.world import World
from pal_ds.heads import UserState
from pal_ds.inference.load_run import restore
from pal_ds.inference.posterior_file import REACH, axes_of
from pal_ds.inference.readers import reader_of
from pal_ds.inference.rewards_at import scored_pairs
from pal_ds.losses import PairFacts, PreferenceLoss
from pal_ds.runs.run_dir import RunDirectory
from tools.bench.environment import describe_environment
from tools.bench.planted_users import HEADS, Planted, make_world

NUM_TEST = 40
COUNTS = (2, 5, 10, 50)
WIDTH = 1.6449
"""Standard deviations on either side of a 90% interval."""
LOSS = PreferenceLoss("logistic", "last")


class Fit(NamedTuple):
    """Users who were fitted from k comparisons."""

    logits: Tensor
    posterior: Posterior
    laplace: Tensor
    """Covariance of the point by Laplace's Gaussian alone, [U, K, K]."""
    users_per_second: float


def fit(world: Planted, count: int) -> Fit:
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


def measure(world: Planted, count: int) -> dict[str, float]:
    torch.manual_seed(count)
    fitted = fit(world, count)
    features, owner = world.pairs(NUM_TEST)
    point = torch.softmax(fitted.logits / world.head.temperature, 1)
    margin = world.margins(features, point[owner])
    error = (margin - world.margins(features, world.truth[owner])).abs()

    def deviation(covariance: Tensor) -> Tensor:
        """Along each axis of the covariance, as `score --std` and `ask` have it."""
        variance = torch.zeros(len(owner))
        for axis in axes_of(covariance).unbind(1):
            far = REACH * axis
            up, down = (world.margins(features, (point + away)[owner]) for away in (far, -far))
            variance += ((up - down) / (2 * REACH)).square()
        return variance.sqrt()

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


def measure_run(run: Path, num_draws: int) -> list[dict[str, float]]:
    """A trained run's held-out users; each draw of their comparisons is a user of its own."""
    restored = restore(RunDirectory(run), trust_code=True)
    data, model = restored.data, restored.model
    fit_rows, test_rows = (data.rows(split) for split in ("unseen_train", "unseen_test"))
    user_of = data.comparisons["user"]
    owners = np.unique(user_of[test_rows])
    table_rows = np.full(len(data.users), -1, np.int64)
    table_rows[owners] = np.arange(len(owners))
    everything = np.union1d(fit_rows, test_rows)
    alone = World(0, 1, torch.device("cpu"))
    reader = reader_of(restored, data, everything, table_rows, alone, encode_ahead=True)
    prior, loss = LogitPrior.of(restored.users), restored.config.loss
    tests = scored_pairs(reader.model, reader.collator, test_rows, 1024)
    owner = table_rows[user_of[test_rows]]
    probability = data.comparisons["probability"][test_rows].astype(float)
    truth = torch.from_numpy(np.log(probability) - np.log1p(-probability)).float()
    results = []
    for count in COUNTS:
        drawn = [few_per_user(data, fit_rows, count, seed) for seed in range(num_draws)]
        users = [n * len(owners) + table_rows[user_of[part]] for n, part in enumerate(drawn)]
        pairs = UserPairs(np.concatenate(drawn), np.concatenate(users), num_draws * len(owners))
        fitted = fit_users(reader.model, reader.collator, pairs, loss=loss, prior=prior)
        begin = time.process_time()
        sure = posterior_of_users(
            reader.model, reader.collator, pairs, fitted, loss=loss, prior=prior
        )
        seconds = time.process_time() - begin
        model.head.eval()
        point = model.head.mixture_weights(UserState(fitted.logits))
        margin, slopes = margins_with_slopes(tests, point, axes_of(sure.covariance))
        own = torch.from_numpy(np.arange(len(point))[:, None] % len(owners) == owner)
        std = slopes.square().sum(1).sqrt()
        error = (margin - truth).abs()
        results.append(
            {
                "num_comparisons": count,
                "coverage": float((error <= WIDTH * std)[own].double().mean()),
                "root_mean_square_error": float(error[own].square().mean().sqrt()),
                "root_mean_square_std": float(std[own].square().mean().sqrt()),
                "std_of_truth": float(truth.std()),
                "users_per_second": len(point) / seconds,
            }
        )
    return results


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
    parser.add_argument("--run_dir", type=Path, help="a run with held-out users, and known truth")
    parser.add_argument("--num_draws", type=int, default=5, help="of a run's users' comparisons")
    options = parser.parse_args()
    torch.set_num_threads(1)
    environment = describe_environment()
    print(json.dumps({"environment": environment}, indent=1))
    if options.run_dir is not None:
        show(str(options.run_dir), measure_run(options.run_dir, options.num_draws))
        return
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
