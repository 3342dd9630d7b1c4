"""Users of a row of a table, in a fixed order: the means by which kernels sum without atomics."""

from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor


class Owners(NamedTuple):
    """Entries of an index by the table row that they name, ascending. Made without a host sync."""

    entries: Int[Tensor, "n"]
    """Entries of the flattened index, those of one row together."""
    first: Int[Tensor, "R"]
    """Begin of each row's entries in `entries`."""
    uses: Int[Tensor, "R"]
    """Number of each row's entries."""


def owners(index: Int[Tensor, "*n"], num_rows: int) -> Owners:
    """The inverse of `index`, int64: rows [0, num_rows) to the entries that name them."""
    named, entries = torch.sort(index.flatten(), stable=True)
    rows = torch.arange(num_rows, device=index.device)
    first = torch.searchsorted(named, rows)
    return Owners(entries, first, torch.searchsorted(named, rows, right=True) - first)
