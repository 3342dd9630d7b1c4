"""The user table by the million: no step costs more for who takes no part, and files are written in blocks."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pal_ds.data.collator import Collator
from pal_ds.data.tables import COMPARISON_DTYPE, PreparedData
from pal_ds.distributed.world import World
from pal_ds.heads import PalA
from pal_ds.inference.mixtures import MixtureSource, user_mixtures, with_mixtures
from pal_ds.users import UserTable, files, rows
from tests.users.test_table import IDS, K, a_table, an_update, tensors_of


def test_new_logits_are_those_of_the_first_version() -> None:
    """A run of before that is resumed with users it had not met must not differ from one of today."""
    table = UserTable(K, ["ann", "b\u00f6", "\u957f" * 9], seed=7)
    assert (table.logits * 2**16).tolist() == [
        [-66481.0, 114009.0, -85216.0],
        [-50249.0, -38885.0, 26368.0],
        [-68021.0, 42889.0, 12068.0],
    ]


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(0, 2**16))
def test_sums_of_a_user_are_those_of_fp64(owners: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-3, 4, (len(owners), 1), generator=draw)
    values = torch.randn(len(owners), K, generator=draw) * scale
    owner = torch.tensor(owners, dtype=torch.int64)
    distinct, made = rows.sum_by_row(owner, values)
    assert distinct.tolist() == sorted(set(owners))
    for row, total in zip(distinct, made, strict=True):
        mine = values[owner == row]
        # A plain sum of n values is off by at most n roundings of the sum of their sizes.
        bound = len(mine) * 2**-24 * mine.double().abs().sum(0) + 1e-30
        assert ((total - mine.double().sum(0)).abs() <= bound).all()


class Watch(TorchDispatchMode):
    """Names the operations that read or make something of the table's size."""

    # Views cost nothing; these touch the rows that an index names.
    ALLOWED = ("view", "slice", "select", "detach", "index_select", "index_put_", "alias", "index")

    def __init__(self, num_users: int) -> None:
        super().__init__()
        self.num_users, self.met, self.large = num_users, set[str](), set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.met.add(name)
        met = torch.utils._pytree.tree_leaves((args, kwargs, out))
        sizes = [x.numel() for x in met if isinstance(x, Tensor)]
        if max(sizes, default=0) >= self.num_users and name not in self.ALLOWED:
            self.large.add(name)
        return out


def test_a_step_touches_nothing_of_the_size_of_the_table() -> None:
    num_users = 10**6
    table = UserTable(K)
    table._rows = rows.UserRows(num_users, K)
    named = torch.randint(num_users, (32,), generator=torch.Generator().manual_seed(0))
    with Watch(num_users) as watch:
        leaf = table.fetch(named).leaf(named)
        table.apply(named, torch.ones_like(leaf), torch.arange(32), 0.05)
    assert {"index_select", "index_put_", "lerp_"} <= watch.met
    assert not watch.large
    assert int(table.step.sum()) == len(named.unique())
    with Watch(num_users) as watch:
        table.mixtures()
    assert watch.large, "the watch would not have seen it"


def test_files_are_the_same_however_many_blocks_they_are_written_in(tmp_path, monkeypatch) -> None:
    table = a_table()
    table.apply(*an_update(0), 0.05)
    table.save(tmp_path / "at_once")
    monkeypatch.setattr(rows, "BLOCK_ROWS", 4)
    monkeypatch.setattr(files, "_IDS_PER_BATCH", 4)
    table.save(tmp_path / "in_blocks")
    name = "users.safetensors"
    content = (tmp_path / "in_blocks" / name).read_bytes()
    assert (tmp_path / "at_once" / name).read_bytes() == content
    # What safetensors' own writer makes of the same tensors, up to spaces in the header.
    tensors = {k: v for k, v in tensors_of(table).items() if k != "seen"}
    with safe_open(str(tmp_path / "in_blocks" / name), "pt") as file:
        own = save(tensors, file.metadata())
    assert (
        own[8 + int.from_bytes(own[:8], "little") :]
        == content[8 + int.from_bytes(content[:8], "little") :]
    )
    for loaded in (UserTable.load(tmp_path / "at_once"), UserTable.load(tmp_path / "in_blocks")):
        assert loaded.ids == IDS
        for key, tensor in tensors_of(table).items():
            assert torch.equal(tensor, tensors_of(loaded)[key])


def test_a_writer_that_fails_still_asks_for_every_block(tmp_path, monkeypatch) -> None:
    """Other ranks give their rows block by block, and would wait for one that has left."""
    monkeypatch.setattr(rows, "BLOCK_ROWS", 2)
    table, asked = a_table(), []

    def read(begin: int, end: int) -> Tensor:
        asked.append((begin, end))
        if begin == 2:
            raise OSError(28, "No space left on device")
        return table._rows.records[begin:end]

    with pytest.raises(OSError, match="No space"):
        files.write_users(tmp_path, table.ids, 0, table._rows, read)
    assert asked == [(0, 2), (2, 4), (4, 6)]


def test_evaluation_looks_up_the_users_it_meets_alone() -> None:
    table = a_table()
    comparisons = np.zeros(5, COMPARISON_DTYPE)
    comparisons["user"] = [4, 1, 4, 6, 2]
    # Users of the data are rows of the table in reverse; the last of them is none.
    table_rows = np.array([5, 4, 3, 2, 1, 0, -1])
    nothing = np.zeros(0, np.int64)
    data = PreparedData(Path(), {}, comparisons, nothing, [*IDS, "x"], nothing.astype(bool), [])
    head = PalA(4, num_prototypes=K)
    everyone, world = user_mixtures(head, table), World(0, 1, torch.device("cpu"))
    for asked in (np.arange(5), np.array([0, 2])):
        source = MixtureSource(forward=head, head=head, users=table, world=world)
        collator, mixtures, _ = with_mixtures(source, Collator(data, table_rows=table_rows), asked)
        found = mixtures[collator.user_rows(asked)]
        wanted = everyone[table_rows[comparisons["user"][asked]]]
        assert torch.allclose(found, wanted, atol=1e-7)
        assert len(mixtures) == len({*table_rows[comparisons["user"][asked]]} - {-1}) + 1
