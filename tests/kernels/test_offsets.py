"""Offsets beyond 2^31 elements, read from sparse files of which a few pages exist."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pal_ds.kernels import eager
from pal_ds.kernels.mix import mix
from pal_ds.kernels.pair_loss import pair_loss
from tests.kernels.cases import comparisons

FAR = 2**31 + 3


@pytest.fixture
def sparse(
    interpreter: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "type[SparseTable]":
    """Keeps the interpreter from copying whole arguments, whose memory it shares already."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *arguments: None)
    SparseTable.folder = tmp_path
    return SparseTable


class SparseTable:
    """fp32 [rows, width] that exists on disk only where it is written."""

    folder: Path

    @classmethod
    def make(cls, rows: int, width: int) -> Tensor:
        table = np.memmap(cls.folder / "table", np.float32, mode="w+", shape=(rows, width))
        return torch.from_numpy(table)


def test_users_beyond_2_31(sparse: type[SparseTable]) -> None:
    logits = sparse.make(FAR, 2)
    logits[FAR - 1] = torch.tensor([1.0, 3.0])
    logits[5] = torch.tensor([2.0, -1.0])
    user, source = torch.tensor([FAR - 1, 5]), torch.zeros(2, dtype=torch.int64)
    prototypes = torch.randn(1, 2, 8)
    with torch.no_grad():
        made = mix(logits, user, prototypes, source, 1.0, "triton")
    wanted = eager.mix(logits[user], torch.arange(2), prototypes, source, 1.0)
    torch.testing.assert_close(made, wanted)


def test_responses_beyond_2_31_elements(sparse: type[SparseTable]) -> None:
    dim = 1024
    rows = FAR // dim + 2
    response = sparse.make(rows, dim)
    case = comparisons(1, 1, dim)
    response[rows - 1], response[rows - 2] = case.response[:, 0]
    index = torch.tensor([[rows - 1, rows - 2]])
    with torch.no_grad():
        made = pair_loss(response[:, None], index, case.point, case.facts, implementation="triton")
    near = case.response.clone()
    wanted = pair_loss(near, torch.tensor([[0, 1]]), case.point, case.facts)
    torch.testing.assert_close(made.reward, wanted.reward)
