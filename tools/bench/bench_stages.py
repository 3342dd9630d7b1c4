"""DSP's stages on a frozen encoder: a general reward head, then one head per domain that goes on from it.

    python tools/bench/bench_stages.py --domains domain_specific_preference.json --helpful helpful.test.json \
      --backbone DIR [--out runs/bench_stages]

Prints, per domain, dev accuracy on the domain's pairs and on the helpful ones, before the stage and after it: what
customising gains, and what it forgets. The recipes are those of the whole models (recipes/dsp_*.yaml) with the backbone
frozen, so that it takes minutes on a CPU; DIR is a folder of all-MiniLM-L6-v2.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

DOMAINS = ("academy", "business", "entertainment", "literature")
FROZEN = (
    "--backbone.tuning=frozen",
    "--backbone.pooling=auto",
    "--backbone.gradient_checkpointing=false",
    "--data.separator= [SEP] ",
    "--optim.learning_rate=3e-3",
    "--train.precision=fp32",
    "--train.ds_config=zero3_cpu",
    "--train.micro_batch_pairs=64",
    "--train.epochs=6",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--domains", required=True, help="DSP's query/responses file")
    parser.add_argument("--helpful", required=True, help="general pairs in text/score form")
    parser.add_argument("--backbone", required=True, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_stages"))
    options = parser.parse_args()
    for path in (options.domains, options.helpful, options.backbone):
        if not Path(path).exists():
            print(f"skipped: {path} is not here")
            return
    from tools.bench.environment import describe_environment

    print(json.dumps({"environment": describe_environment()}, indent=1))
    general = options.out / "general"
    train(options, "dsp_base", general, options.helpful, f"--backbone.path={options.backbone}")
    print(f"{'domain':14s} its own pairs          helpful pairs")
    for domain in DOMAINS:
        run = options.out / domain
        train(
            options,
            "dsp_customised",
            run,
            options.domains,
            f"--data.source.users=[{domain}]",
            "--head=BradleyTerry",
            "--loss.lm_weight=0",
            f"--train.init_from={general}",
            f"--train.eval_sets={{helpful: {options.out / 'general_data'}}}",
        )
        first, last = ends(run)
        own, kept = (f"{first[key]:.3f} -> {last[key]:.3f}" for key in ("dev", "helpful"))
        print(f"{domain:14s} {own}         {kept}")


def train(options: argparse.Namespace, recipe: str, run: Path, raw: str, *own: str) -> None:
    """One stage; a finished one is left as it is."""
    dev = ["--data.dev_fraction=0.2"]
    words = [
        f"--config={ROOT / 'pal_ds' / 'recipes' / recipe}.yaml",
        f"--run_dir={run}",
        f"--data.path={run}_data",
        f"--data.source.path={raw}",
        f"--data.tokenizer={options.backbone}",
        f"--backbone.cache={options.out / 'cache'}",
    ]
    command = [sys.executable, "-m", "pal_ds", "train", *words, *dev, *FROZEN, *own]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def ends(run: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Accuracies of the first and the last evaluation of a run, by set."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [
        {name: row[f"{name}_accuracy"] for name in ("dev", "helpful")}
        for row in rows
        if "helpful_accuracy" in row
    ]
    return found[0], found[-1]


if __name__ == "__main__":
    main()
