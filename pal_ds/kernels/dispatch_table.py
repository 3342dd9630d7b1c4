"""Defaults of fused kernels: the rows that `tools/bench/bench_head.py` has measured faster.

A row is added by hand from that benchmark's output and names it. What no row covers runs the plain reference, so a
machine that nobody measured loses speed and nothing else. The choice is a function of hardware, dtype and shape:
all ranks agree, and a resumed run repeats its arithmetic.
"""

from typing import Literal, NamedTuple

Implementation = Literal["triton", "compile", "torch"]


class Row(NamedTuple):
    """A region of shapes and what runs there."""

    kernel: str
    hardware: str
    """`cpu`, or `sm_` and the compute capability."""
    dtype: str
    bounds: dict[str, tuple[int, int]]
    """Smallest and largest value of each size, inclusive; a size not named is free."""
    implementation: Implementation
    evidence: str
    """Command, date and machine of the measurement."""


TABLE: tuple[Row, ...] = ()
"""Empty: no GPU has been measured. The first row that fits decides."""

LIMITS: dict[str, dict[str, int]] = {
    "pair_loss": {"d": 2048},
    "mix": {"K": 64, "h": 1 << 20},
    "score_all": {"K": 64},
}
"""The largest sizes that the Triton kernels are written and tested for."""
