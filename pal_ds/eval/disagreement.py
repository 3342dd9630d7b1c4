"""Comparisons on which users disagree: those where a reward that is the same for everyone cannot be right twice."""

import numpy as np


def controversial(table: np.ndarray) -> np.ndarray:
    """Mark comparisons on which users disagree, as their source says or else as these rows show; bool [n].

    `table` is in `COMPARISON_DTYPE`. A pair of responses, in either order, is controversial where two different users
    prefer different ones of them, and then all comparisons of it are; a user at odds with nobody but themselves makes
    none.
    """
    low, high = np.minimum(table["a"], table["b"]), np.maximum(table["a"], table["b"])
    pair = np.unique(low * (high.max(initial=0) + 1) + high, return_inverse=True)[1]
    prefers_high = (table["label"] > 0) == (table["b"] == high)
    num_users = len(np.unique(table["user"]))
    user = np.unique(table["user"], return_inverse=True)[1]
    judges = np.bincount(np.unique(pair * num_users + user) // max(num_users, 1))
    share = np.bincount(pair, weights=prefers_high) / np.maximum(np.bincount(pair), 1)
    shown = ((judges > 1) & (share > 0) & (share < 1))[pair]
    said = table["controversial"]
    return np.where(said >= 0, said == 1, shown)
