"""Reward heads by name: the one place that lists them."""

from .base import Features, Head, HeadOutput, UserState
from .bradley_terry import BradleyTerry
from .categorical import Categorical
from .lore import Lore
from .mean_variance import MeanVariance
from .mrm import Mrm
from .pal_a import PalA
from .pal_b import PalB
from .per_domain import PerDomain
from .spl import Spl
from .vpl import Vpl
from .vrf import Vrf

HEADS: dict[str, type[Head]] = {
    head.__name__: head
    for head in (
        PalA,
        PalB,
        BradleyTerry,
        Lore,
        Vpl,
        Spl,
        Mrm,
        Vrf,
        MeanVariance,
        Categorical,
        PerDomain,
    )
}

__all__ = [
    "HEADS",
    "BradleyTerry",
    "Categorical",
    "Features",
    "Head",
    "HeadOutput",
    "Lore",
    "MeanVariance",
    "Mrm",
    "PalA",
    "PalB",
    "PerDomain",
    "Spl",
    "UserState",
    "Vpl",
    "Vrf",
]
