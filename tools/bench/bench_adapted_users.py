"""Users whom `adapt` serves worse than before: on their own comparisons, each left out of the fit in turn.

    python tools/bench/bench_adapted_users.py RUN [RUN ...] [--split unseen_train] [--num_pairs N] [--out FILE]

For each run its new users are fitted; shown are how many there are, the mean accuracy before and on pairs left out, the
share of users who do worse on these than before, and the share of those who do so beyond chance: of the pairs on which
the two differ, more are lost than in 95 of 100 users with whom nothing has changed (one-sided sign test).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import binom

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pal_ds
from tools.bench.environment import describe_environment

LEVEL = 0.05


def figures_of(run: str, split: str, num_pairs: int | None) -> dict[str, float]:
    """Fit the run's new users in a folder that is removed again, and count."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/users"
        report = pal_ds.adapt(run, None, out, split=split, num_pairs=num_pairs).report
    entries = [entry for entry in report["users"].values() if "accuracy_left_out" in entry]
    if not entries:
        raise SystemExit(f"{run}: its head fits no users")
    before, after, pairs = (
        np.array([entry[key] for entry in entries])
        for key in ("accuracy_before", "accuracy_left_out", "pairs")
    )
    lost = np.rint((before - after) * pairs)
    # At least so many pairs differ. More would make a loss likelier by chance: this counts too many rather than few.
    beyond_chance = (lost > 0) & (binom.sf(lost - 1, np.abs(lost), 0.5) < LEVEL)
    return {
        "users": len(entries),
        "accuracy_before": float(before.mean()),
        "accuracy_left_out": float(after.mean()),
        "share_worse": float((lost > 0).mean()),
        "share_worse_beyond_chance": float(beyond_chance.mean()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--split", default="unseen_train")
    parser.add_argument("--num_pairs", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures = {}
    for run in arguments.runs:
        figures[run] = figures_of(run, arguments.split, arguments.num_pairs)
        print(
            run, " ".join(f"{key} {value:.3f}" for key, value in figures[run].items()), flush=True
        )
    if arguments.out is not None:
        record = {"figures": figures, "environment": describe_environment()}
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
