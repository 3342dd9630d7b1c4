"""Random draws of a training per comparison: keyed, so that every rank and every start draws alike."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.plan import keyed_generator


@dataclass(frozen=True)
class Draws:
    """Random draws of an update of a training; everything is keyed, nothing is a stream."""

    seed: int
    num_prototypes: int
    kinds: frozenset[str]
    """Noise that the head reads: of gumbel, normal."""
    num_context: int = 0
    """Comparisons of the user to draw."""
    update: int = 0
    epoch: int = 0

    def noise(self, positions: np.ndarray) -> dict[str, Tensor]:
        """By kind, noise [B, K] of comparisons at these positions of the update."""
        functions = {"gumbel": gumbel_noise, "normal": normal_noise}
        key = (self.seed, self.update, positions, self.num_prototypes)
        return {kind: torch.from_numpy(functions[kind](*key)) for kind in self.kinds}


def keyed_hashes(key: tuple[object, ...], rows: np.ndarray, num: int) -> np.ndarray:
    """uint64 [len(rows), num], a function of the key and each row alone, whatever rows stand beside it."""
    start = keyed_generator(*key).integers(0, 2**64, dtype=np.uint64)
    counter = rows.astype(np.uint64)[:, None] * np.uint64(num) + np.arange(num, dtype=np.uint64)
    return _splitmix64(counter ^ start)


def gumbel_noise(seed: int, update: int, positions: np.ndarray, num_prototypes: int) -> np.ndarray:
    """Standard Gumbel noise [B, K] (fp32), keyed by (seed, update, position in the update) per comparison.

    A counter hash rather than one stream, so that a comparison keeps its noise however the update is split.
    """
    uniform = _uniform(keyed_hashes(("gumbel", seed, update), positions, num_prototypes))
    return (-np.log(-np.log(np.clip(uniform, 1e-12, 1 - 1e-12)))).astype(np.float32)


def normal_noise(seed: int, update: int, positions: np.ndarray, size: int) -> np.ndarray:
    """Standard normal noise [B, size] (fp32), keyed as `gumbel_noise` (Box and Muller 1958)."""
    radius = 1 - _uniform(keyed_hashes(("radius", seed, update), positions, size))
    angle = _uniform(keyed_hashes(("angle", seed, update), positions, size))
    return (np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle)).astype(np.float32)


def keyed_uniform(key: tuple[object, ...], rows: np.ndarray) -> np.ndarray:
    """fp64 in [0, 1) [n], a function of the key and each row alone."""
    return _uniform(keyed_hashes(key, rows, 1))[:, 0]


def _uniform(hashes: np.ndarray) -> np.ndarray:
    """fp64 in [0, 1)."""
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(value: np.ndarray) -> np.ndarray:
    """Sebastiano Vigna's splitmix64 finaliser, vectorised; wraps modulo 2**64 by design."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
