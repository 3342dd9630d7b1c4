"""Users from scratch: each user's own logistic regression on stored states, which know nothing of other users."""

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.collator import Collator
from pal_ds.eval.logistic_regression import (
    FLOATS_PER_BATCH,
    OwnedPairs,
    fit_regressions,
    weights_of,
)
from pal_ds.heads.jaxtyping_fallback import Float

NAME = "regression from scratch"
"""Its row in tables."""


def scratch_margins(
    collator: Collator,
    *,
    fit_rows: np.ndarray,
    fit_owner: np.ndarray,
    num_users: int,
    test_rows: np.ndarray,
    test_owner: np.ndarray,
) -> Float[np.ndarray, "n"]:
    """Margins of test comparisons by the regression of each one's owner on the owner's comparisons; fp64.

    Owners are 0..num_users-1; a comparison may be fitted, or tested, for several of them. Ties are left out of the fit,
    and of a soft label the likelier choice counts. The margin is 0 for an owner without comparisons.

    Args:
        collator: with stored states of these comparisons' responses, or data of vectors.
        fit_rows: comparisons to fit, rows of the table; int64 [m].
        fit_owner: owner of each; int64 [m].
        num_users: number of owners.
        test_rows: comparisons to score; int64 [n].
        test_owner: owner of each; int64 [n].
    """
    table = collator.data.comparisons
    sure = table["label"][fit_rows] != 0
    fitted_rows, pair = np.unique(fit_rows[sure], return_inverse=True)
    labels = torch.from_numpy(table["label"][fitted_rows].astype(np.float32))
    signed = _differences(collator, fitted_rows) * labels[:, None]
    responses = np.stack([table[key][fitted_rows] for key in ("a", "b")], 1).astype(np.int64)
    owned = OwnedPairs(signed, responses, pair, fit_owner[sure], num_users)
    fitted = fit_regressions(owned)
    scored_rows, scored = np.unique(test_rows, return_inverse=True)
    differences = _differences(collator, scored_rows)
    margins = np.zeros(len(test_rows))
    order = np.argsort(test_owner, kind="stable")
    for first, weights in weights_of(owned, fitted):
        begin, end = np.searchsorted(test_owner[order], (first, first + len(weights)))
        mine = order[begin:end]
        num_parts = max(1, -(-len(mine) * weights.shape[1] // FLOATS_PER_BATCH))
        for part in np.array_split(mine, num_parts):
            own = weights[torch.from_numpy(test_owner[part] - first)]
            products = differences[torch.from_numpy(scored[part])] * own
            margins[part] = products.double().sum(1).numpy()
    return margins


def _differences(collator: Collator, rows: np.ndarray) -> Float[Tensor, "n H"]:
    """Last state of response_2 less that of response_1, fp32 on the CPU."""
    table = collator.data.comparisons[rows]
    responses, index = np.unique(np.concatenate([table["a"], table["b"]]), return_inverse=True)
    states = _last_states(collator, responses)
    first, second = torch.from_numpy(index.reshape(2, -1))
    return states[second] - states[first]


def _last_states(collator: Collator, responses: np.ndarray) -> Float[Tensor, "n H"]:
    """State at the last position of each response, by which an export scores; fp32."""
    vectors, store = collator.data.response_vectors, collator.response_store
    if vectors is not None:
        return torch.from_numpy(np.asarray(vectors[responses], np.float32))
    assert store is not None, "texts were encoded ahead"
    longest = int(store.lengths_of(responses).max(initial=1))
    step = max(1, FLOATS_PER_BATCH // (longest * store.width))
    parts = np.split(responses, range(step, len(responses), step))
    # Positions past a text's end repeat its last.
    states = [store.gather(part, longest)[:, -1].float() for part in parts if len(part)]
    return torch.cat([torch.empty(0, store.width), *states])
