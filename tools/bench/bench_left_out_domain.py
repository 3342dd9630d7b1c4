"""New users outside the training population: DSP with each of its five writers left out in turn.

    python tools/bench/bench_left_out_domain.py --data domain_specific_preference.json --encoder FOLDER --work DIR
        [--mixture free signed softmax] [--seeds 1 2 3] [--num_draws 20] [--set KEY=VALUE ...] [--out FILE]

Four writers each prefer their own answer to all five's; LoRe is trained on them, with the fifth writer's answers among
the rejected. The fifth is then fitted from k = 2, 5, 10, 20, 50 of their comparisons on the queries of training, and
tested on queries that nobody has met: accuracy per domain, and the mean of five, for every kind of weights.
`regression` is each writer's own, from the same comparisons alone. FOLDER holds all-MiniLM-L6-v2; states are encoded
once, into DIR/cache. `--set` changes a key of the recipe for all.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pal_ds
from tools.bench.environment import describe_environment
from tools.bench.frozen_encoder import frozen_encoder_keys

DOMAINS = ("academy", "business", "entertainment", "literature", "normal")
NUM_COMPARISONS = [2, 5, 10, 20, 50]


def recipe(arguments: argparse.Namespace, domain: str) -> dict[str, Any]:
    """Keys of a run that holds this domain out."""
    source = {"path": arguments.data, "new_users": [domain]}
    keys: dict[str, Any] = {
        **frozen_encoder_keys(arguments.encoder, arguments.work),
        "data.path": f"{arguments.work}/data_{domain}",
        "data.source.class_path": "Dsp",
        "data.source.init_args": source,
        "data.split": "ordinal",
        "data.dev_fraction": 0.1,
        "data.test_fraction": 0.2,
        "train.epochs": 6,
        "optim.learning_rate": 1e-2,
        "head.class_path": "Lore",
    }
    return keys | dict(pair.split("=", 1) for pair in arguments.set)


def curves_of(
    arguments: argparse.Namespace, domain: str, mixture: str, seed: int
) -> tuple[list[float], list[float]]:
    """Accuracy of the domain's writer after each number of comparisons, by the run and by a regression from scratch.

    A run that is there is gone on with.
    """
    keys = recipe(arguments, domain)
    own = {"num_prototypes": arguments.num_prototypes, "mixture": mixture}
    keys |= {"head.init_args": own, "train.seed": seed}
    name = "_".join(
        [domain, mixture, str(seed), *(pair.replace("/", "-") for pair in arguments.set)]
    )
    run = pal_ds.train({}, f"{arguments.work}/runs/{name}", **keys)
    figures = pal_ds.few_shot(run, NUM_COMPARISONS, arguments.num_draws)
    own, scratch = figures["curve"], figures["scratch"]
    return [row["accuracy"] for row in own], [row["accuracy"] for row in scratch]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--mixture", nargs="+", default=["free", "signed", "softmax"])
    parser.add_argument("--domains", nargs="+", default=list(DOMAINS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--num_prototypes", type=int, default=8)
    parser.add_argument("--num_draws", type=int, default=20)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    print("k".ljust(32) + "".join(f"{k:>8}" for k in NUM_COMPARISONS), flush=True)
    for mixture in arguments.mixture:
        for domain in arguments.domains:
            both = [curves_of(arguments, domain, mixture, seed) for seed in arguments.seeds]
            for name, curves in zip((mixture, "regression"), zip(*both, strict=True), strict=True):
                figures.setdefault(name, {})[domain] = curves
                _show(f"{name}, {domain}", np.mean(curves, 0))
        for name in (mixture, "regression"):
            _show(f"{name}, mean", np.mean(list(figures[name].values()), (0, 1)))
    if arguments.out:
        report = {"environment": describe_environment(), "accuracy": figures}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


def _show(name: str, accuracy: np.ndarray) -> None:
    print(name.ljust(32) + "".join(f"{one:8.3f}" for one in accuracy), flush=True)


if __name__ == "__main__":
    main()
