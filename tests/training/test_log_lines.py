"""Lines of a training in a log: one per line of metrics.jsonl where no bar is drawn, and one at the end."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from pal_ds.distributed.world import World
from pal_ds.runs.run_dir import BestEvaluation, RunDirectory
from pal_ds.training.log_lines import ProgressLines, log_end, warn_of_gap

ROW: dict[str, Any] = {
    "step": 20,
    "loss": 0.5,
    "accuracy": 0.75,
    "pairs_per_second": 1234.56,
    "skipped_updates": 0,
}


def lines_of(rank: int = 0) -> ProgressLines:
    lines = ProgressLines(World(rank, 2, torch.device("cpu")), num_updates=100)
    lines.begin(10)
    return lines


def test_a_line_tells_where_a_training_stands(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pal_ds"):
        lines_of().updates(ROW)
        lines_of().updates({**ROW, "loss": None, "skipped_updates": 3})
        lines_of().evaluation(20, {"dev": 0.8125, "other": None})
    first, second, third = caplog.messages
    assert first.startswith(
        "update 20 of 100: loss 0.5000, accuracy 0.7500, 1,234.6 pairs/s, 0:00:0"
    )
    assert first.endswith(" GiB") and float(first.split()[-2]) > 0
    assert "loss none" in second and second.endswith("3 updates skipped")
    assert third == "update 20 of 100: accuracy on dev 0.8125, other none"


def test_other_ranks_are_silent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pal_ds"):
        lines_of(rank=1).updates(ROW)
    assert not caplog.messages


def test_the_end_says_what_comes_next(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    with caplog.at_level(logging.INFO, "pal_ds"):
        log_end(
            RunDirectory(tmp_path / "run"), {"step": 7, "dev_accuracy": 0.9, "temperature": 1.0}
        )
        log_end(RunDirectory(tmp_path / "run"), None)
    assert f"best accuracy on dev 0.9000, at update 7. Everything is in {tmp_path}" in caplog.text
    assert "no evaluation on dev was made" in caplog.text
    assert f"`pal-ds evaluate --run_dir {tmp_path / 'run'}`" in caplog.text


def test_what_comes_next_can_be_typed_as_it_is(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """A path with a space is quoted, and a head of one's own needs leave."""
    run = RunDirectory(tmp_path / "my run")
    run.write_config("head: {class_path: my_heads.Mine}\n")
    with caplog.at_level(logging.INFO, "pal_ds"):
        log_end(run, None)
        run.write_config("head: {class_path: PalA}\ndata: {path: a.b}\n")
        log_end(run, None)
    first, second = caplog.messages
    assert first.endswith(f"`pal-ds evaluate --run_dir '{run.path}' --trust_code`")
    assert second.endswith(f"`pal-ds evaluate --run_dir '{run.path}'`")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"step": 5, "loss": 0.0}], "no evaluation on dev was made"),
        ([{"step": 5, "other_accuracy": 0.5}], "no evaluation on dev was made"),
        ([{"step": 0, "dev_accuracy": 0.0}], "dev was evaluated before the first update alone"),
        ([{"step": 0, "dev_accuracy": 0.5}, {"step": 5, "dev_accuracy": 0.0}], "not finite in any"),
    ],
)
def test_why_no_checkpoint_is_the_best(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, rows: list[dict[str, Any]], words: str
) -> None:
    run = RunDirectory(tmp_path / "run")
    run.path.mkdir()
    for row in rows:
        run.append_metrics(row)
    with caplog.at_level(logging.INFO, "pal_ds"):
        log_end(run, None)
        log_end(run, {"step": 5, "dev_accuracy": 0.0, "temperature": 1.0})
    first, second = caplog.messages
    assert words in first
    assert "best accuracy on dev 0.0000, at update 5" in second


def test_a_gap_of_train_and_dev_is_warned_of(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    run = RunDirectory(tmp_path)
    lines = [{**ROW, "accuracy": accuracy, "epoch": 1.0, "step": 1} for accuracy in (0.98, 0.96)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for accuracy, num_prompts in ((0.8, 30), (0.55, 30), (0.3, 29)):
        best: BestEvaluation = {"step": 1, "dev_accuracy": accuracy, "temperature": 1.0}
        warn_of_gap(run, best, num_prompts)
    warn_of_gap(run, None, 30)
    (message,) = caplog.messages
    assert "accuracy in training (0.970) and on dev (0.550) part by 42 points" in message
