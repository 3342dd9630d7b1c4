"""How well fits do on comparisons that they were not fitted to: users' own, left out in turn."""

import numpy as np
import torch
from torch import Tensor

from pal_ds.adaptation.fit import Chunk, Solver, UserPairs, UserPrior, chunks_of, fit_chunk
from pal_ds.data.collator import Collator
from pal_ds.distributed import phase
from pal_ds.eval.metrics import correctness
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.losses import PreferenceLoss, decision_margin
from pal_ds.model import RewardModel

NUM_PARTS = 5
"""Parts into which each user's comparisons are cut; users of up to so many are left one out at a time."""


def right_where_left_out(
    model: RewardModel,
    collator: Collator,
    pairs: UserPairs,
    *,
    loss: PreferenceLoss,
    prior: UserPrior,
    solver: Solver,
    initial: Float[Tensor, "U K"],
) -> Float[np.ndarray, "U"]:
    """How many of each user's comparisons a fit to the user's others explains, fp64; a tie counts half.

    Each user is fitted anew without each part of the comparisons. Those on one prompt are left out together, where a
    user has more than one prompt: they often share a response, and then one implies another. `prior`, `solver` and
    `initial` are those of the fit whose figure this is.
    """
    rows, owner, num_users = pairs
    parts = _parts(collator.data.response_prompt[collator.data.comparisons["a"][rows]], owner)
    by_user = np.argsort(owner, kind="stable")
    right = np.zeros(num_users)
    begin = 0
    for users, chunk in chunks_of(model, collator, pairs):
        end = begin + len(chunk.owner)
        part = torch.from_numpy(parts[by_user[begin:end]]).to(chunk.owner.device)
        starts = initial[users].to(chunk.owner.device)
        margins = _margins_where_left_out(chunk, part, loss, prior, solver, starts)
        label = chunk.batch.label.cpu().numpy().astype(float)
        chosen = correctness(margins.cpu().numpy(), label)
        right[users.numpy()] = np.bincount(chunk.owner.cpu().numpy(), chosen, len(users))
        begin = end
    return right


def _margins_where_left_out(
    chunk: Chunk,
    part: Int[Tensor, "n"],
    loss: PreferenceLoss,
    prior: UserPrior,
    solver: Solver,
    starts: Float[Tensor, "U K"],
) -> Float[Tensor, "n"]:
    """The margin of each comparison by the fit to those of other parts."""
    margins = torch.zeros(len(part), device=part.device)
    for number in range(int(part.max()) + 1):
        phase.progress()
        weight = chunk.batch.weight * (part != number)
        others = chunk._replace(batch=chunk.batch._replace(weight=weight))
        fitted = fit_chunk(others, loss, prior, solver, starts)
        with torch.no_grad():
            of_all = decision_margin(chunk.margins(fitted.logits), chunk.batch.window_end)
        margins = torch.where(part == number, of_all, margins)
    return margins


def _parts(prompt: Int[np.ndarray, "n"], owner: Int[np.ndarray, "n"]) -> Int[np.ndarray, "n"]:
    """Part of each comparison, 0 to NUM_PARTS - 1: in turn by the user's prompts, or by comparisons where it is one.

    >>> _parts(np.array([4, 4, 9, 4, 4]), np.array([0, 0, 0, 1, 1])).tolist()
    [0, 0, 1, 0, 1]
    """
    _, of_prompt = np.unique(np.stack([owner, prompt], 1), axis=0, return_inverse=True)
    of_prompt = of_prompt.ravel()
    first_prompt = np.full(owner.max(initial=-1) + 1, len(prompt))
    np.minimum.at(first_prompt, owner, of_prompt)
    by_prompt = of_prompt - first_prompt[owner]
    last_prompt = np.zeros_like(first_prompt)
    np.maximum.at(last_prompt, owner, by_prompt)
    by_user = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[by_user], owner[by_user])
    by_comparison = np.empty_like(by_prompt)
    by_comparison[by_user] = np.arange(len(owner)) - starts
    return np.where(last_prompt[owner] > 0, by_prompt, by_comparison) % NUM_PARTS
