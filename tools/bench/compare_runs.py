"""Two runs on the same pairs: the paired difference of their accuracies with a 95% interval, clustered by prompt.

python tools/bench/compare_runs.py RUN_A RUN_B [--split dev]
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pal_ds.distributed.world import World
from pal_ds.eval.metrics import clustered_standard_error, correctness
from pal_ds.inference.load_run import restore
from pal_ds.inference.readers import known_users, reader_of
from pal_ds.inference.scoring import Forwards
from pal_ds.runs.run_dir import RunDirectory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("run_a", type=Path)
    parser.add_argument("run_b", type=Path)
    parser.add_argument("--split", default="dev")
    options = parser.parse_args()
    (right_a, keys_a, prompts), (right_b, keys_b, _) = (
        scored(path, options.split) for path in (options.run_a, options.run_b)
    )
    if keys_a != keys_b:
        sys.exit("the two runs were trained on different data: their pairs cannot be paired")
    difference = right_b - right_a
    half = 1.96 * clustered_standard_error(difference, prompts)
    mean = difference.mean()
    figures = {
        "pairs": len(difference),
        "accuracy_a": right_a.mean(),
        "accuracy_b": right_b.mean(),
        "difference": mean,
        "difference_ci95": [mean - half, mean + half],
    }
    print(json.dumps(figures, indent=1))


def scored(path: Path, split: str) -> tuple[np.ndarray, str, np.ndarray]:
    """(right or wrong per pair, hash of the data, prompt of each pair) of a run's latest checkpoint."""
    restored = restore(RunDirectory(path))
    data, world = restored.data, World(0, 1, torch.device("cpu"))
    rows = data.rows(split)
    known = known_users(restored, None)
    reader = reader_of(restored, data, rows, known.table_rows(data), world, encode_ahead=True)
    margins = Forwards(reader.model, reader.collator, 128, world).margins(rows, known.mixtures)
    labels = data.comparisons["label"][rows].astype(float)
    return (
        correctness(margins, labels),
        data.hash,
        data.response_prompt[data.comparisons["a"][rows]],
    )


if __name__ == "__main__":
    main()
