"""Reward heads by name: the one place that lists them."""

from .base import Features, Head, HeadOutput, UserState
from .bradley_terry import BradleyTerry
from .pal_a import PalA
from .pal_b import PalB

HEADS: dict[str, type[Head]] = {head.__name__: head for head in (PalA, PalB, BradleyTerry)}

__all__ = [
    "HEADS",
    "BradleyTerry",
    "Features",
    "Head",
    "HeadOutput",
    "PalA",
    "PalB",
    "UserState",
]
