"""What `tools/bench/bench_step.py` holds before it times: the gate of loss and gradients, and its data."""

import numpy as np
import pytest
import torch

from pal_ds.data.collator import Collator
from tests.spawn import run_process
from tools.bench.bench_step import LARGEST_ERROR, largest_error
from tools.bench.step_case import END, PAD, Case, make_pairs, prepared
from tools.bench.step_report import CLOCKS, interleave


@pytest.mark.slow
def test_every_layout_of_ours_passes_the_gate() -> None:
    """PAL-A and PAL-B on a tiny OPT, without the contestants that others must install."""
    printed = run_process(
        *("--families", "opt", "--hidden_size", 16, "--num_layers", 1, "--vocab_size", 64),
        *("--pairs", 1, "--rounds", 1),
        launcher=("tools/bench/bench_step.py",),
    )
    assert "NOT MEASURED" not in printed
    assert printed.count("left out: no --reference given") == 4
    # Rows padded to 512 against rows padded to the longest, PAL-A and PAL-B.
    assert printed.count("head on the window") == 2 and printed.count("parity") >= 2


def test_the_gate_compares_each_gradient_with_its_own_scale() -> None:
    wanted = {"loss": torch.tensor(2.0), "a": torch.tensor([4.0, 1.0]), "b": torch.tensor([1e-2])}
    assert largest_error(dict(wanted), wanted) == 0.0
    assert largest_error({**wanted, "b": torch.tensor([1.1e-2])}, wanted) > LARGEST_ERROR
    assert largest_error({**wanted, "loss": torch.tensor(2.1)}, wanted) > LARGEST_ERROR
    assert largest_error({**wanted, "a": torch.tensor([4.0, 1.0 + 4e-6])}, wanted) < LARGEST_ERROR
    # What ought to be 0 is noise: it is held against 1/1000 of the largest gradient.
    noise = {**wanted, "b": torch.tensor([1e-9])}
    assert largest_error({**noise, "b": torch.tensor([-1e-9])}, noise) < LARGEST_ERROR
    assert largest_error({"loss": wanted["loss"]}, wanted) == float("inf")


def test_pairs_become_the_batch_that_the_trainer_reads(tmp_path) -> None:
    timed = make_pairs(3, 40, 10, 64, seed=0, spread=0.3)
    parity = make_pairs(2, 40, 10, 64, seed=1, spread=0.3, equal=True)
    assert all(len(first) == len(second) for first, second in parity.responses)
    case = Case("opt", tmp_path, 16, 64, timed, parity, tmp_path)
    data = prepared(case)
    assert data.rows("train").tolist() == [0, 1, 2] and data.rows("dev").tolist() == [3, 4]
    batch = Collator(data, pad_token_id=PAD)(np.arange(3), np.arange(3))
    assert batch.input_ids is not None and batch.attention_mask is not None
    assert int(batch.attention_mask.sum()) == timed.num_real_tokens
    assert timed.num_real_tokens - timed.num_unique_tokens == sum(map(len, timed.prompts))
    ends = batch.input_ids.gather(1, batch.attention_mask.sum(1, keepdim=True) - 1)
    assert (ends == END).all() and batch.label.tolist() == timed.labels.tolist()
    better, worse = timed.chosen_and_rejected()
    first = better if timed.labels[0] == -1 else worse
    assert batch.input_ids[0, : len(first[0])].tolist() == first[0].tolist()


def test_rounds_are_interleaved_and_the_first_is_not_counted() -> None:
    order: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def step(self) -> None:
            order.append(self.name)

    times = interleave({"a": Named("a"), "b": Named("b")}, 7, CLOCKS["wall"])  # type: ignore[arg-type]
    assert order == ["a", "b"] * 8
    assert [len(seconds) for seconds in times.values()] == [7, 7]
