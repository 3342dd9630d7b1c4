"""The quickstart over several seeds: shares of Bayes accuracy, distance of Bradley-Terry, new users after 16 pairs.

python tools/bench/bench_quickstart.py [--seeds 3] [--out runs/bench_quickstart]
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_quickstart"))
    options = parser.parse_args()
    rows, minutes = [], []
    for seed in range(options.seeds):
        out, started = options.out / f"seed{seed}", time.monotonic()
        if (out / "summary.json").is_file():
            print(f"seed {seed}: taken from {out}, not run now")
            rows.append(json.loads((out / "summary.json").read_text()))
            continue
        command = [
            sys.executable,
            str(ROOT / "tools" / "quickstart.py"),
            f"--seed={seed}",
            f"--out={out}",
        ]
        subprocess.run(command, check=True)
        minutes.append((time.monotonic() - started) / 60)
        rows.append(json.loads((out / "summary.json").read_text()))
    from tools.bench.environment import describe_environment

    print(
        json.dumps(
            {"environment": describe_environment(), "minutes": minutes, "summaries": rows}, indent=1
        )
    )
    for name, line in figures(rows).items():
        print(f"{name:14s} {line}")


def figures(rows: list[dict[str, dict[str, float]]]) -> dict[str, str]:
    """Means over seeds, one line per head."""
    lines = {}
    for name in rows[0]:
        share = [row[name]["seen"] / row[name]["bayes_seen"] for row in rows]
        behind = [100 * (row["pal_a"]["seen"] - row[name]["seen"]) for row in rows]
        drop = [100 * (row[name]["seen"] - row[name]["unseen_16"]) for row in rows]
        lines[name] = (
            f"seen {_mean(share):.1%} of Bayes ({', '.join(f'{value:.1%}' for value in share)}); "
            f"{_mean(behind):.1f} points below PAL-A; new users {_mean(drop):.1f} points below seen"
        )
    return lines


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
