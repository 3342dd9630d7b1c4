"""Annotators who each have prompts of their own, as real ones do: does a head learn tastes, or whose prompt is whose?

    python tools/bench/bench_own_prompts.py --data domain_specific_preference.json --encoder FOLDER --work DIR
        [--seeds 2 3 4] [--num_draws 20] [--shared] [--set KEY=VALUE ...] [--out FILE]

Of DSP's 500 queries the last 100 are for tests. 50 annotators, ten who prefer each of the five writers' answers to the
other four: 40 of them have eight queries each that nobody else has (`--shared`: of all 400, whoever has them, too), ten
are new users, who answer thirteen of the 80 that are left. Shown are the accuracies in training and on test queries of
the 40, and of the ten after k = 2, 5, 10, 20, 50 comparisons. FOLDER holds all-MiniLM-L6-v2, DIR keeps its states.
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

NUM_COMPARISONS = [2, 5, 10, 20, 50]
NUM_WRITERS, NUM_SEEN, NUM_NEW = 5, 40, 10
TEST_QUERIES = 40
"""Of each annotator, of the last 100."""
METHODS: dict[str, dict[str, Any]] = {
    "PAL-A": {
        "head.class_path": "PalA",
        "head.init_args": {"user_point": "Pw", "num_layers": 1, "similarity": "cosine"},
    },
    "PAL-B": {"head.class_path": "PalB", "head.init_args": {"num_layers": 1}},
    "PAL-B, prompt_dropout 0": {
        "head.class_path": "PalB",
        "head.init_args": {"num_layers": 1, "prompt_dropout": 0.0},
    },
    "LoRe": {"head.class_path": "Lore", "head.init_args": {}, "optim.learning_rate": 1e-2},
}


def write_records(path: Path, queries: list[dict[str, Any]], seed: int, *, shared: bool) -> None:
    """Comparisons of all annotators, as lines of JSON."""
    draw = np.random.default_rng(seed)
    order, writers = draw.permutation(400), sorted(queries[0]["responses"])
    with path.open("w") as file:
        for user in range(NUM_SEEN + NUM_NEW):
            is_seen = user < NUM_SEEN
            if not is_seen:
                own = draw.choice(order[320:], 13, replace=False)
            elif shared:
                own = draw.choice(400, 8, replace=False)
            else:
                own = order[8 * user : 8 * user + 8]
            tests = 400 + draw.choice(100, TEST_QUERIES, replace=False)
            for split, chosen in (("train", own), ("test", tests)):
                for query in chosen.tolist():
                    texts = queries[query]["responses"]
                    best = writers[user % NUM_WRITERS]
                    for other in writers:
                        record = {"user_id": f"annotator {user}", "seen": is_seen, "split": split}
                        record |= {"prompt": queries[query]["query"]}
                        record |= {"chosen": texts[best], "rejected": texts[other]}
                        if other != best:
                            file.write(json.dumps(record) + "\n")


def figures_of(arguments: argparse.Namespace, records: Path, method: str, seed: int) -> list[float]:
    """Accuracy in training, of the 40 on test queries, and of the ten after each number of comparisons."""
    name = f"{records.stem}_{method.replace(' ', '').replace(',', '_')}"
    own = METHODS[method]
    keys: dict[str, Any] = {
        **frozen_encoder_keys(arguments.encoder, arguments.work),
        "data.path": f"{arguments.work}/{records.stem}",
        "data.source.class_path": "Jsonl",
        "data.source.init_args.path": str(records),
        "data.split": "field",
        "train.epochs": 30,
        # Chosen with the annotators of seed 1: of six layers and the last, and of dropout 0, 0.5, 0.65 and 0.8.
        "backbone.num_layers": 3,
        "train.feature_dropout": 0.5,
        "train.seed": seed,
        "optim.learning_rate": 1e-3,
    }
    keys |= own | {"head.init_args": {"num_prototypes": NUM_WRITERS, **own["head.init_args"]}}
    keys |= dict(pair.split("=", 1) for pair in arguments.set)
    run = pal_ds.train({}, f"{arguments.work}/runs/{name}", **keys)
    evaluated = pal_ds.evaluate(run)
    curve = pal_ds.few_shot(run, NUM_COMPARISONS, arguments.num_draws)["curve"]
    return [
        evaluated["train_accuracy"],
        evaluated["accuracy"],
        *(row["accuracy"] for row in curve),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--num_draws", type=int, default=20)
    parser.add_argument("--shared", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    work, figures = Path(arguments.work), {}
    work.mkdir(parents=True, exist_ok=True)
    queries = json.loads(Path(arguments.data).read_text())
    columns = ["train", "seen", *(f"k {k}" for k in NUM_COMPARISONS)]
    print("".ljust(28) + "".join(f"{name:>8}" for name in columns), flush=True)
    for method in arguments.methods:
        rows = []
        for seed in arguments.seeds:
            records = work / f"{'shared' if arguments.shared else 'own'}_{seed}.jsonl"
            write_records(records, queries, seed, shared=arguments.shared)
            rows.append(figures_of(arguments, records, method, seed))
        figures[method] = rows
        means = "".join(f"{one:8.3f}" for one in np.mean(rows, 0))
        print(method.ljust(28) + means, flush=True)
    if arguments.out:
        report = {"environment": describe_environment(), "columns": columns, "accuracy": figures}
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
