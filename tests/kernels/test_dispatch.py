"""The choice of an implementation: a table and nothing else, refusals with a reason, one line of log."""

import logging
from types import SimpleNamespace

import pytest
import torch

from pal_ds.kernels import dispatch, eager
from pal_ds.kernels.dispatch import choose, covers
from pal_ds.kernels.dispatch_table import LIMITS, TABLE, Row
from pal_ds.kernels.fused_loss import FusedLoss
from pal_ds.kernels.pair_loss import pair_loss
from pal_ds.losses import PreferenceLoss
from tests.kernels.cases import comparisons, same_bits

X = torch.zeros(1)
ROW = Row("pair_loss", "cpu", "float32", {"d": (64, 512)}, "triton", "measured")


@pytest.fixture(autouse=True)
def _forget() -> None:
    dispatch._say.cache_clear()
    dispatch.has_triton.cache_clear()


def test_the_shipped_table_keeps_the_cpu_on_plain_torch() -> None:
    for kernel, limits in LIMITS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert choose(kernel, X.to(dtype), dict.fromkeys(limits, 8)) == "torch"
    assert not [row for row in TABLE if row.hardware == "cpu"]


def test_every_row_of_the_table_is_well_formed() -> None:
    for row in TABLE:
        assert row.kernel in LIMITS and row.evidence, row
        assert set(row.bounds) <= set(LIMITS[row.kernel]), row
        assert all(low <= high for low, high in row.bounds.values()), row


def test_a_row_decides_by_hardware_dtype_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    table = (ROW,)
    assert choose("pair_loss", X, {"d": 64}, table=table) == "triton"
    assert choose("pair_loss", X, {"d": 513}, table=table) == "torch"
    assert choose("pair_loss", X.bfloat16(), {"d": 64}, table=table) == "torch"
    assert choose("mix", X, {"K": 4, "h": 64}, table=table) == "torch"
    monkeypatch.setattr(dispatch, "hardware_of", lambda device: "sm_90")
    assert choose("pair_loss", X, {"d": 64}, table=table) == "torch"


def test_without_triton_a_row_falls_back_and_a_demand_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: False)
    with caplog.at_level(logging.INFO, "pal_ds.kernels.dispatch"):
        assert choose("pair_loss", X, {"d": 64}, table=(ROW,)) == "torch"
    assert "triton is not installed" in caplog.text
    with pytest.raises(ValueError, match="triton is not installed"):
        choose("pair_loss", X, {"d": 64}, "triton")


def test_a_demand_beyond_the_limits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "has_triton", lambda: True)
    with pytest.raises(ValueError, match="d is 2049 and it is written for 2048"):
        choose("pair_loss", X, {"d": 2049}, "triton")
    with pytest.raises(ValueError, match="must be one of triton, compile, torch"):
        choose("pair_loss", X, {"d": 8}, "fast")


def test_the_choice_and_its_reason_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "pal_ds.kernels.dispatch"):
        for _ in range(3):
            choose("pair_loss", X, {"d": 8})
    assert [record.getMessage() for record in caplog.records] == [
        "kernel pair_loss on cpu, float32: torch "
        "(no row of the dispatch table covers this hardware, dtype and shape)"
    ]


def test_compile_compiles_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """The suite's shape checks cannot be traced: that the result is right is held by tools/bench/bench_head.py."""
    compiled: list[object] = []
    monkeypatch.setattr(
        "pal_ds.kernels.pair_loss.compiled", lambda function: compiled.append(function) or function
    )
    case = comparisons(3, 4, 6, cosine=True)
    made = case.compute("logistic", "mean", "compile")
    assert same_bits(made, case.compute("logistic", "mean", "torch"))
    assert compiled == [eager.pair_loss]


def test_unset_means_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    case = comparisons(2, 1, 4)
    made = pair_loss(case.response, case.index, case.point, case.facts)
    assert torch.equal(made.margin, case.compute("logistic", "last", "torch")["margin"])


def test_hardware_without_a_row_has_no_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The training step then runs as if there were no kernels."""
    loss, cpu = PreferenceLoss("hinge", "mean"), torch.device("cpu")
    assert FusedLoss.where_it_pays(loss, cpu) is None
    assert covers("pair_loss", cpu, (ROW,)) and not covers("mix", cpu, (ROW,))
    assert not covers("pair_loss", cpu, (ROW._replace(implementation="torch"),))
    monkeypatch.setattr("pal_ds.kernels.fused_loss.covers", lambda kernel, device: True)
    assert isinstance(FusedLoss.where_it_pays(loss, cpu), FusedLoss)


def test_the_judge_applies_the_loss_of_the_run() -> None:
    case = comparisons(4, 6, 5, cosine=True, points=2)
    place = SimpleNamespace(
        response=case.response, response_index=case.index, point=case.point, scale=case.scale
    )
    loss = PreferenceLoss("smooth_hinge", "cumulative")
    output, facts = FusedLoss(loss).compute(place, case.facts), case.facts
    each = loss(output.margin, facts.label, facts.start, facts.end, facts.required_margin)
    torch.testing.assert_close(output.loss, each)
    torch.testing.assert_close(output.total, (each * facts.weight).sum())
