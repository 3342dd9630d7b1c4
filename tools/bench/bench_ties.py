"""UKP's "equal" answers: is what users say known better where training hears of ties than where it drops them?

    python tools/bench/bench_ties.py --data sample_labels.csv --arguments arguments.jsonl --encoder FOLDER --work DIR
        [--every 2] [--seed 1] [--head BradleyTerry] [--set KEY=VALUE ...] [--out FILE]

Every second topic is left out in turn; the two after it are dev. Shown is the three-way log-loss (first, second, equal)
of all test comparisons, a mean over topics, for each way of `WAYS`, and its difference from `drop` with the 95%
interval over topics. `half` and `drop` learn no threshold; Davidson's is fitted on dev for both, so that what differs
is the margins. FOLDER holds all-MiniLM-L6-v2, whose first three layers are read; DIR keeps states and runs.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pal_ds
from pal_ds.compare.intervals import half_width
from tools.bench.environment import describe_environment
from tools.bench.frozen_encoder import frozen_encoder_keys

WAYS = {
    "drop": {"loss.ties": "drop"},
    "half": {"loss.ties": "half"},
    "davidson": {"loss.ties": "davidson"},
    "rao_kupper": {"loss.ties": "rao_kupper"},
    "per user": {"loss.ties": "davidson", "users.tie_threshold": "learnt", "users.prior": "learnt"},
}
"""Keys of each way; `per user` has Davidson's threshold for each user, under a prior whose spread is learnt."""


def losses_of_topic(arguments: argparse.Namespace, topics: list[str], place: int) -> list[float]:
    """Three-way log-loss on one topic, for each way; a run that is there is gone on with."""
    topic, *dev = (topics[(place + shift) % len(topics)] for shift in range(3))
    source = {"path": arguments.data, "arguments": arguments.arguments}
    losses = []
    for way, of_way in WAYS.items():
        keys: dict[str, Any] = {
            **frozen_encoder_keys(arguments.encoder, arguments.work),
            "backbone.num_layers": 3,
            "data.path": f"{arguments.work}/data_{topic}",
            "data.source.class_path": "UkpConvArg",
            "data.source.init_args": {**source, "test_topics": [topic], "dev_topics": dev},
            "data.split": "field",
            "head.class_path": arguments.head,
            "train.epochs": 6,
            "train.feature_dropout": 0.5,
            "train.seed": arguments.seed,
            "optim.learning_rate": 3e-3,
            **of_way,
        }
        keys |= dict(pair.split("=", 1) for pair in arguments.set)
        name = f"{topic}_{way.replace(' ', '_')}_{arguments.head}_{arguments.seed}"
        run = pal_ds.train({}, f"{arguments.work}/runs/{name}", **keys)
        losses.append(pal_ds.evaluate(run, split="test")["ties"]["log_loss"])
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("data", "arguments", "encoder", "work"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--head", default="BradleyTerry")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with open(arguments.data, encoding="utf-8", newline="") as file:
        topics = sorted({row["topic"] for row in csv.DictReader(file)})
    places = range(0, len(topics), arguments.every)
    table = np.array([losses_of_topic(arguments, topics, place) for place in places])
    figures = {}
    for way, losses in zip(WAYS, table.T, strict=True):
        difference = losses - table[:, 0]
        figures[way] = {"log_loss": float(losses.mean()), "less_drop": float(difference.mean())}
        figures[way]["half_width"] = half_width(difference.tolist())
        print(
            f"{way:12}{losses.mean():8.4f}  against drop {difference.mean():+.4f}"
            f" +- {figures[way]['half_width'] or 0.0:.4f}"
        )
    if arguments.out is not None:
        record = {"figures": figures, "environment": describe_environment()}
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
