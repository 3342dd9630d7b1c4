"""Split of each comparison: decided per prompt, with users that are held out whole."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xxhash

from pal_ds.errors import UserError

SPLITS = ("train", "dev", "test", "unseen_train", "unseen_dev", "unseen_test")
"""Names in the order of their codes on disk."""
NUM_BASE_SPLITS = 3
NO_SPLIT = -1


@dataclass(frozen=True)
class SplitOptions:
    """Options of the split of prompts and users; the defaults put everything in train."""

    split: Literal["hash", "ordinal", "field"] = "hash"
    dev_fraction: float = 0.0
    test_fraction: float = 0.0
    unseen_user_fraction: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.split not in ("hash", "ordinal", "field"):
            raise UserError(f"split is '{self.split}'; it must be hash, ordinal or field")
        for key in ("dev_fraction", "test_fraction", "unseen_user_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise UserError(f"{key} is {getattr(self, key)}; it must lie between 0 and 1")
        if self.dev_fraction + self.test_fraction > 1:
            raise UserError(
                f"dev_fraction {self.dev_fraction} + test_fraction {self.test_fraction} is more "
                "than 1; their sum is the share of prompts that is not trained on"
            )


def prompt_fraction(seed: int, digest: bytes) -> float:
    """Place a prompt in [0, 1) by its hash: the lowest go to test, the next to dev."""
    return xxhash.xxh3_64_intdigest(digest, seed=seed & (2**64 - 1)) / 2**64


def user_fraction(seed: int, user_id: str) -> float:
    """Place a user in [0, 1) by a hash of the id: those below `unseen_user_fraction` are held out."""
    key = b"user\x1f" + user_id.encode("utf-8", "surrogatepass")
    return xxhash.xxh3_64_intdigest(key, seed=seed & (2**64 - 1)) / 2**64


def prompt_splits(options: SplitOptions, fractions: np.ndarray, fields: np.ndarray) -> np.ndarray:
    """Decide the split of each distinct prompt, in order of first appearance.

    Args:
        options: how to split.
        fractions: place of each prompt in [0, 1), see `prompt_fraction`; fp64 [P].
        fields: split code that the records themselves give; int [P], read for `split: field` alone.

    Returns:
        place of each prompt's split in `SPLITS`: train 0, dev 1 or test 2; int8 [P].

    >>> options = SplitOptions(dev_fraction=0.2, test_fraction=0.1)
    >>> prompt_splits(options, np.array([0.05, 0.25, 0.8]), np.zeros(3)).tolist()
    [2, 1, 0]
    """
    if options.split == "field":
        return fields.astype(np.int8)
    num_prompts = len(fractions)
    if options.split == "ordinal":
        train_end = round(num_prompts * (1 - options.dev_fraction - options.test_fraction))
        dev_end = round(num_prompts * (1 - options.test_fraction))
        order = np.arange(num_prompts)
        return (order >= train_end).astype(np.int8) + (order >= dev_end)
    codes = np.zeros(num_prompts, np.int8)
    codes[fractions < options.test_fraction + options.dev_fraction] = SPLITS.index("dev")
    codes[fractions < options.test_fraction] = SPLITS.index("test")
    return codes


def seen_users(options: SplitOptions, users: list[str], given: np.ndarray) -> np.ndarray:
    """Per user, whether they are trained on; `given` is 1 seen, 0 not, -1 left to the fraction."""
    seen = given != 0
    if options.unseen_user_fraction:
        for row in np.flatnonzero(given < 0):
            seen[row] = user_fraction(options.seed, users[row]) >= options.unseen_user_fraction
    return seen
