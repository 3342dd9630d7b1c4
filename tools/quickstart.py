"""The whole story on this machine: prepare, train three heads with ZeRO-3 on two processes, evaluate, adapt, export.

    python tools/quickstart.py [--seed 0] [--out runs/quickstart]

Every step is a command that works the same on real data; each is printed before it runs.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "pal_ds" / "recipes"
HEADS = {"pal_a": "PAL-A", "pal_b": "PAL-B", "btl": "Bradley-Terry"}
RECIPE_OF = {
    "pal_a": "quickstart_pal_a",
    "pal_b": "quickstart_pal_b",
    "btl": "quickstart_bradley_terry",
}
NUM_NEW_USER_COMPARISONS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if num_gpus() < 2:
        # Two ranks cannot share one GPU; the quickstart is meant for two CPU cores anyway.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    out, started = options.out.resolve(), time.monotonic()
    summary = {name: run_head(name, out, options.seed) for name in HEADS}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    exported = out / "exported_pal_a"
    if not exported.exists():
        call([sys.executable, "tools/consolidate.py", out / "pal_a", exported])
    print_table(summary)
    print(f"report: {report(out)}")
    print(f"a scalar reward model of PAL-A for the average user: {exported}")
    print(f"done in {(time.monotonic() - started) / 60:.1f} minutes")


def num_gpus() -> int:
    """GPUs that nvidia-smi lists: asked before torch is imported, which would pin the answer."""
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return done.stdout.count("GPU ")


def call(command: list[Any]) -> None:
    """Runs a command from the repository's root and stops here if it fails."""
    words = [str(word) for word in command]
    print("$", " ".join(word.replace(sys.executable, "python") for word in words), flush=True)
    done = subprocess.run(words, cwd=ROOT)
    if done.returncode:
        sys.exit(done.returncode)


def run_head(name: str, out: Path, seed: int) -> dict[str, Any]:
    """Trains and evaluates one head; the figures of summary.json."""
    run_dir = out / name
    recipe = [
        f"--config={RECIPES / 'quickstart.yaml'}",
        f"--config={RECIPES / RECIPE_OF[name]}.yaml",
    ]
    overrides = [
        f"--data.path={out / 'data'}",
        f"--data.source.seed={seed}",
        f"--train.seed={seed}",
    ]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "pal_ds",
    ]
    call([*launcher, "train", *recipe, *overrides, f"--run_dir={run_dir}"])
    import torch

    from pal_ds.adaptation.few_shot import evaluate_few_shot
    from pal_ds.distributed.world import World
    from pal_ds.eval.evaluate import evaluate_run
    from pal_ds.runs.run_dir import RunDirectory

    run = RunDirectory(run_dir)
    print(f"$ python -m pal_ds evaluate --run_dir {run_dir}", flush=True)
    seen = evaluate_run(run, World(0, 1, torch.device("cpu")))
    print(f"$ python -m pal_ds few_shot --run_dir {run_dir}", flush=True)
    counts = [0, 1, 2, 4, 8, NUM_NEW_USER_COMPARISONS, 32]
    curve = evaluate_few_shot(run, counts, num_draws=3)["curve"]
    new = next(row for row in curve if row["num_comparisons"] == NUM_NEW_USER_COMPARISONS)
    return {
        "seen": seen["accuracy"],
        "unseen_16": new["accuracy"],
        "bayes_seen": seen.get("bayes_accuracy"),
        "bayes_unseen": new.get("bayes_accuracy"),
    }


def print_table(summary: dict[str, dict[str, float]]) -> None:
    """Accuracy on held-out prompts: users seen in training, and new users after 16 comparisons."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "head",
        "seen users",
        f"new users, {NUM_NEW_USER_COMPARISONS} comparisons",
        "best possible (Bayes)",
    )
    for name, row in summary.items():
        cells = (row["seen"], row["unseen_16"])
        shares = (row["seen"] / row["bayes_seen"], row["unseen_16"] / row["bayes_unseen"])
        shown = [
            f"{cell:.3f} ({share:.0%} of Bayes)" for cell, share in zip(cells, shares, strict=True)
        ]
        table.add_row(HEADS[name], *shown, f"{row['bayes_seen']:.3f} / {row['bayes_unseen']:.3f}")
    Console().print(table)


def report(out: Path) -> Path:
    """The page with pictures, users coloured by their planted group."""
    from pal_ds.data.tables import PreparedData
    from pal_ds.eval.report import write_report
    from pal_ds.runs.run_dir import RunDirectory

    data = PreparedData.open(out / "data")
    groups = dict(zip(data.users, data.user_group, strict=True))
    return write_report(
        {HEADS[name]: RunDirectory(out / name) for name in HEADS}, out / "report", groups
    )


if __name__ == "__main__":
    main()
