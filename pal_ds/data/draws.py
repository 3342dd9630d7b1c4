"""Random draws of a training, of noise and of a user's other comparisons: keyed, so all ranks and starts draw alike."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.plan import keyed_generator
from pal_ds.data.tables import PreparedData


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
    return (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix64(value: np.ndarray) -> np.ndarray:
    """Sebastiano Vigna's splitmix64 finaliser, vectorised; wraps modulo 2**64 by design."""
    with np.errstate(over="ignore"):
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


TRIES = 4
"""Candidates per wanted comparison of a user who has many: some repeat, or share the prompt."""


@dataclass(frozen=True)
class Contexts:
    """Draws comparisons of a user from those that may be known of the user (the train split)."""

    data: PreparedData
    rows: np.ndarray
    """The comparisons to draw from, by user, int64."""
    first: np.ndarray
    """Place in `rows` of the first of each user of the data, and the end, int64 [U + 1]."""
    seed: int

    @staticmethod
    def of(data: PreparedData, rows: np.ndarray, seed: int) -> "Contexts":
        """Index the comparisons `rows` by user."""
        users = data.comparisons["user"][rows]
        order = np.argsort(users, kind="stable")
        first = np.searchsorted(users[order], np.arange(len(data.users) + 1))
        return Contexts(data, rows[order].astype(np.int64), first, seed)

    def draw(self, rows: np.ndarray, epoch: int, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw for each comparison of `rows` up to `num_pairs` others of its user about other prompts, none twice.

        Returns:
            (comparisons int64 [B, num_pairs], of which the first so many count int64 [B]); what lies behind them
            repeats the comparison itself.
        """
        owners, num_tries = self.data.comparisons["user"][rows], TRIES * num_pairs
        hashes = keyed_hashes(("context", self.seed, epoch), rows, num_tries)
        candidates, there = self._candidates(owners, hashes)
        there &= self._prompts(candidates) != self._prompts(rows)[:, None]
        return _first_of(candidates, there, num_pairs, rows)

    def known(self, users: np.ndarray, num_pairs: int) -> tuple[np.ndarray, np.ndarray]:
        """Fix the context of each of these users outside a training: up to `num_pairs`, as `draw` gives them.

        Behind them, and for a user of whom nothing is known, stands row 0.
        """
        hashes = keyed_hashes(("known", self.seed), users, TRIES * num_pairs)
        candidates, there = self._candidates(users, hashes)
        return _first_of(candidates, there, num_pairs, np.zeros(len(users), np.int64))

    def _candidates(self, users: np.ndarray, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(comparisons [n, tries] of these users, whether each is there and for the first time).

        Of a user with at most so many all are looked at, in hashed order; of others that many, at hashed places.
        """
        # A user whom the data do not hold has none.
        users, known = np.maximum(users, 0), users >= 0
        count = np.where(known, self.first[users + 1] - self.first[users], 0)[:, None]
        place = np.arange(hashes.shape[1])[None, :]
        few = np.argsort(np.where(place < count, hashes, np.iinfo(np.uint64).max), axis=1)
        many = (hashes % np.maximum(count, 1).astype(np.uint64)).astype(np.int64)
        is_few = count <= hashes.shape[1]
        chosen = np.where(is_few, few, many)
        there = np.where(is_few, place < count, ~_is_repeated(many))
        index = np.minimum(self.first[users][:, None] + chosen, max(len(self.rows) - 1, 0))
        rows = self.rows if len(self.rows) else np.zeros(1, np.int64)
        return rows[index], there

    def _prompts(self, rows: np.ndarray) -> np.ndarray:
        return self.data.response_prompt[self.data.comparisons["a"][rows]]


def _is_repeated(chosen: np.ndarray) -> np.ndarray:
    """Mark entries that stand further left in their row already."""
    order = np.argsort(chosen, axis=1, kind="stable")
    ranked = np.take_along_axis(chosen, order, axis=1)
    again = np.zeros(chosen.shape, bool)
    again[:, 1:] = ranked[:, 1:] == ranked[:, :-1]
    repeated = np.empty_like(again)
    np.put_along_axis(repeated, order, again, axis=1)
    return repeated


def _first_of(
    candidates: np.ndarray, there: np.ndarray, num_pairs: int, rest: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The first `num_pairs` candidates of each row that are there, then `rest`; and how many there are."""
    order = np.argsort(~there, axis=1, kind="stable")[:, :num_pairs]
    chosen = np.take_along_axis(candidates, order, axis=1)
    length = np.minimum(there.sum(1), num_pairs).astype(np.int64)
    return np.where(np.arange(num_pairs) < length[:, None], chosen, rest[:, None]), length


def preferred_first(data: PreparedData, rows: np.ndarray) -> np.ndarray:
    """Responses of the comparisons `rows`, the preferred one first, [n, 2]."""
    table = data.comparisons[rows]
    pairs = np.stack([table["a"], table["b"]], axis=1)
    return np.where(table["label"][:, None] < 0, pairs, pairs[:, ::-1])
