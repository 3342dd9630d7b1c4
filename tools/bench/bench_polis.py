"""Polis: a low-rank logistic model of each conversation's votes, what `polis_held_out_votes` is held against.

    python tools/bench/bench_polis.py --polis FOLDER [--conversations NAME ...] [--table TABLE_JSON] [--out FILE]

FOLDER holds conversations of compdemocracy/openData. Comparisons, splits and unseen participants are those of the suite
polis_held_out_votes; the seen participants' test pairs are scored. The model reads no text: a participant u likes a
statement j by b_j + <p_u, q_j>, a pair is logistic in the difference. Fitted to the train pairs by L-BFGS in fp64 with
an L2 penalty on b, p and q. Rank (0 is one score for all) and penalty are those that are best on the dev pairs.
TABLE_JSON is a table that `pal-ds compare` wrote for the suite: its methods then stand beside the model.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from pal_ds.compare.intervals import half_width
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Polis
from pal_ds.data.tables import PreparedData
from pal_ds.eval.metrics import clustered_interval, correctness
from tools.bench.environment import describe_environment

RANKS = (0, 1, 2, 4, 8)
PENALTIES = (1.0, 3.0, 10.0, 30.0)
MAX_STEPS = 200
PAIRS_PER_PARTICIPANT = 50
UNSEEN_FRACTION = 0.2
"""As the suite has it."""


class Pairs(NamedTuple):
    """Comparisons of one split."""

    user: Tensor
    first: Tensor
    second: Tensor
    label: Tensor
    """-1: the first statement is liked better, +1: the second; fp64."""


class Model(NamedTuple):
    """Scores of statements, and points of participants and statements [n, rank]."""

    score: Tensor
    participant: Tensor
    statement: Tensor

    def margins(self, pairs: Pairs) -> Tensor:
        """Log-odds that the second statement is liked better."""
        direction = self.statement[pairs.second] - self.statement[pairs.first]
        personal = (self.participant[pairs.user] * direction).sum(1)
        return self.score[pairs.second] - self.score[pairs.first] + personal


class Row(TypedDict):
    """Figures of one conversation."""

    rank: int
    penalty: float
    dev_accuracy: float
    one_score: float
    """Test accuracy of the best model of rank 0."""
    accuracy: float
    accuracy_ci95: list[float]
    """Clustered by participant."""
    pairs: int
    methods: dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--polis", type=Path, required=True)
    parser.add_argument("--conversations", nargs="+")
    parser.add_argument("--table", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not options.polis.is_dir():
        sys.exit(f"{options.polis}: no such folder; nothing to measure")
    torch.set_num_threads(1)
    names = options.conversations or sorted(path.name for path in options.polis.iterdir())
    methods = {} if options.table is None else methods_of(options.table)
    print(describe_environment())
    rows = {}
    for name in names:
        own = {method: by_fold[name] for method, by_fold in methods.items() if name in by_fold}
        rows[name] = measure(data_of(options.polis, name), own)
        print(line_of(name, rows[name]), flush=True)
    print_means(rows)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1))


def methods_of(table: Path) -> dict[str, dict[str, float]]:
    """Accuracy of each method of a suite by fold."""
    content = json.loads(table.read_text())
    rows = {**content["methods"], **content.get("baselines", {})}
    return {name: row["accuracy"].get("by_fold", {}) for name, row in rows.items()}


def data_of(folder: Path, name: str) -> PreparedData:
    """Tables of a conversation as the suite splits it; tokens do not matter here."""
    source = Polis(str(folder), [name], "votes", pairs_per_participant=PAIRS_PER_PARTICIPANT)
    with tempfile.TemporaryDirectory(prefix="bench_polis_") as place:
        config = DataConfig(
            path=str(Path(place, "data")),
            source=source,
            split="record",
            unseen_user_fraction=UNSEEN_FRACTION,
            vocab_size=300,
            max_length=4096,
        )
        data = prepare(config, quiet=True)
        # Read before the folder goes.
        return replace(data, comparisons=np.array(data.comparisons))


def pairs_of(data: PreparedData, split: str) -> Pairs:
    """Comparisons of a split as tensors."""
    table = data.comparisons[data.rows(split)]
    columns = [torch.from_numpy(table[key].astype(np.int64)) for key in ("user", "a", "b")]
    return Pairs(columns[0], columns[1], columns[2], torch.from_numpy(table["label"].astype(float)))


def fit(pairs: Pairs, *, sizes: tuple[int, int], rank: int, penalty: float) -> Model:
    """Fit the model to pairs; `sizes` are (participants, statements). Points start as small normal numbers, seed 0."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(sizes[1],), (sizes[0], rank), (sizes[1], rank)]
    parts = [0.1 * torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    model = Model(torch.zeros_like(parts[0]), parts[1], parts[2])
    trained = [part.requires_grad_() for part in model if part.numel()]
    optimizer = torch.optim.LBFGS(
        trained, max_iter=MAX_STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = softplus(-pairs.label * model.margins(pairs)).sum()
        loss = loss + penalty / 2 * sum(part.square().sum() for part in trained)
        loss.backward()
        return loss

    optimizer.step(closure)
    return Model(*(part.detach() for part in model))


def accuracy(model: Model, pairs: Pairs) -> np.ndarray:
    """Correctness of each pair."""
    return correctness(model.margins(pairs).numpy(), pairs.label.numpy())


def measure(data: PreparedData, methods: dict[str, float]) -> Row:
    """Choose rank and penalty on dev, then score the test pairs."""
    train, dev, test = (pairs_of(data, split) for split in ("train", "dev", "test"))
    sizes = len(data.users), len(data.response_prompt)
    tried: list[tuple[float, int, float, Model]] = []
    for rank in RANKS:
        for penalty in PENALTIES:
            model = fit(train, sizes=sizes, rank=rank, penalty=penalty)
            tried.append((float(accuracy(model, dev).mean()), rank, penalty, model))
    dev_accuracy, rank, penalty, model = max(tried, key=lambda one: one[0])
    one_score = max((one for one in tried if one[1] == 0), key=lambda one: one[0])[-1]
    right = accuracy(model, test)
    return {
        "rank": rank,
        "penalty": penalty,
        "dev_accuracy": dev_accuracy,
        "one_score": float(accuracy(one_score, test).mean()),
        "accuracy": float(right.mean()),
        "accuracy_ci95": list(clustered_interval(right, test.user.numpy())),
        "pairs": len(right),
        "methods": methods,
    }


def line_of(name: str, row: Row) -> str:
    """One conversation for people."""
    low, high = row["accuracy_ci95"]
    others = "".join(f"; {method} {value:.3f}" for method, value in row["methods"].items())
    return (
        f"{name}: {row['pairs']} pairs, one score for all {row['one_score']:.3f}, low-rank {row['accuracy']:.3f} "
        f"[{low:.3f}, {high:.3f}] (rank {row['rank']}, penalty {row['penalty']:g}){others}"
    )


def print_means(rows: dict[str, Row]) -> None:
    """Means over conversations, and each method's gain over the low-rank model with its t-interval."""
    mean, one_score = (
        float(np.mean([row[key] for row in rows.values()])) for key in ("accuracy", "one_score")
    )
    print(f"mean of {len(rows)}: one score for all {one_score:.3f}, low-rank {mean:.3f}")
    for method in next(iter(rows.values()))["methods"]:
        gains = [
            row["methods"][method] - row["accuracy"]
            for row in rows.values()
            if method in row["methods"]
        ]
        half = half_width(gains)
        spread = "" if half is None else f" +-{half:.3f}"
        print(f"{method}: {np.mean(gains):+.3f}{spread} over low-rank")


if __name__ == "__main__":
    main()
