"""The low-rank model of Polis finds a planted taste of two camps, and its objective's minimum."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.data.sources.test_real_people import write_conversation
from tools.bench import bench_polis
from tools.bench.bench_polis import Pairs, data_of, fit, measure


def test_two_camps_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Camps agree on half of 24 statements and are opposed on the others; each votes on two thirds of them."""
    draw = np.random.default_rng(0)
    opinion = draw.standard_normal(24)
    turned = np.arange(24) % 2 == 0
    votes = {}
    for person in range(60):
        liked = np.where(turned & (person % 2 == 1), -opinion, opinion)
        agrees = liked + 0.5 * draw.standard_normal(24) > 0
        cells = [str(2 * int(agree) - 1) if draw.random() < 0.67 else "" for agree in agrees]
        votes[str(person)] = ",".join(cells)
    write_conversation(tmp_path / "on.tea", votes, 24)
    monkeypatch.setattr(bench_polis, "RANKS", (0, 1))
    monkeypatch.setattr(bench_polis, "PENALTIES", (1.0, 10.0))
    row = measure(data_of(tmp_path, "on.tea"), {"x": 0.5})
    assert row["pairs"] > 100 and row["rank"] == 1
    assert row["accuracy"] > row["one_score"] + 0.1 and row["accuracy"] > 0.85
    assert "x 0.500" in bench_polis.line_of("on.tea", row)


def test_one_score_for_all_is_a_bradley_terry_model() -> None:
    """Two statements, three of four comparisons for the first: the gradient of the penalised loss vanishes."""
    zeros = torch.zeros(4, dtype=torch.int64)
    labels = torch.tensor([-1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    pairs = Pairs(zeros, zeros, zeros + 1, labels)
    model = fit(pairs, sizes=(1, 2), rank=0, penalty=0.5)
    margin = float(model.score[1] - model.score[0])
    wrong = 3 * torch.sigmoid(torch.tensor(margin)) - torch.sigmoid(torch.tensor(-margin))
    assert 0.5 * float(model.score[1]) == pytest.approx(-float(wrong), abs=1e-6) and margin < 0
