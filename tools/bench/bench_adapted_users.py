"""Users whom `adapt` serves worse than before: on comparisons left out of the fit, and on ones that nobody fitted.

    python tools/bench/bench_adapted_users.py RUN [RUN ...] [--split unseen_train] [--held_out unseen_test]
        [--num_pairs N] [--out FILE]

For each run its new users are fitted; shown are how many there are, the mean accuracy before and on pairs left out, the
share of users who do worse on these than before, and the share of those who do so beyond chance: of the pairs on which
the two differ, more are lost than in 95 of 100 users with whom nothing has changed (one-sided sign test).

With `--held_out` the same shares are shown on that split, for fits to all comparisons of `--split`; and the accuracy
there of a rule that leaves at the population whoever does worse on pairs left out (`gated`).
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


def shares(before: np.ndarray, after: np.ndarray, pairs: np.ndarray) -> tuple[float, float]:
    """Share of users, (num_users,) accuracies of so many pairs each, who are worse after, and worse beyond chance."""
    lost = np.rint((before - after) * pairs)
    # At least so many pairs differ. More would make a loss likelier by chance: this counts too many rather than few.
    beyond_chance = (lost > 0) & (binom.sf(lost - 1, np.abs(lost), 0.5) < LEVEL)
    return float((lost > 0).mean()), float(beyond_chance.mean())


def figures_of(
    run: str, *, split: str, held_out: str | None, num_pairs: int | None
) -> dict[str, float]:
    """Fit the run's new users in a folder that is removed again, and count."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/users"
        report = pal_ds.adapt(run, None, out, split=split, num_pairs=num_pairs).report
        entries = {u: e for u, e in report["users"].items() if "accuracy_left_out" in e}
        if not entries:
            raise SystemExit(f"{run}: its head fits no users")
        before, after, pairs = (
            np.array([entry[key] for entry in entries.values()])
            for key in ("accuracy_before", "accuracy_left_out", "pairs")
        )
        worse, beyond_chance = shares(before, after, pairs)
        figures = {
            "users": len(entries),
            "accuracy_before": float(before.mean()),
            "accuracy_left_out": float(after.mean()),
            "share_worse": worse,
            "share_worse_beyond_chance": beyond_chance,
        }
        if held_out is not None:
            flagged = dict(zip(entries, after < before, strict=True))
            figures |= _held_out(run, out, split=held_out, flagged=flagged)
    return figures


def _held_out(run: str, users: str, *, split: str, flagged: dict[str, bool]) -> dict[str, float]:
    """Return the figures of a split that no fit has seen; `flagged` says who does worse on pairs left out."""
    without, adapted = (
        pal_ds.evaluate(run, split=split, users=table, name=f"{split}_of_adapted_users")
        for table in (None, users)
    )
    # Whom the run does not know are strangers to it until the folder names them.
    without, adapted = without["unknown_users"]["users"], adapted["users"]
    names = [name for name in flagged if name in adapted]
    before, after, pairs = (
        np.array([side[name][key] for name in names])
        for side, key in ((without, "accuracy"), (adapted, "accuracy"), (adapted, "pairs"))
    )
    worse, beyond_chance = shares(before, after, pairs)
    gated = np.where([flagged[name] for name in names], before, after)
    return {
        "held_out_before": float(before.mean()),
        "held_out_after": float(after.mean()),
        "held_out_gated": float(gated.mean()),
        "held_out_share_worse": worse,
        "held_out_share_worse_beyond_chance": beyond_chance,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--split", default="unseen_train")
    parser.add_argument("--held_out")
    parser.add_argument("--num_pairs", type=int)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    figures = {}
    for run in arguments.runs:
        figures[run] = figures_of(
            run,
            split=arguments.split,
            held_out=arguments.held_out,
            num_pairs=arguments.num_pairs,
        )
        print(
            run, " ".join(f"{key} {value:.3f}" for key, value in figures[run].items()), flush=True
        )
    if arguments.out is not None:
        record = {"figures": figures, "environment": describe_environment()}
        arguments.out.write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
