"""Best of n: of the candidates for one prompt and user, how good is the one the model puts first, in the user's eyes?

Axes: L lists (one user, one prompt), N candidates in all, of which list l has those from first[l] to first[l + 1].
"""

from typing import NamedTuple, cast

import numpy as np

from pal_ds.eval.metrics import clustered_standard_error
from pal_ds.eval.schema import RankingFigures, RankingMeans

FIGURES = ("top1", "regret", "regret_normalised", "kendall_tau_b")
PAIRS_AT_ONCE = 2**22
"""Number of pairs of candidates compared in one go: bounds memory."""


class Lists(NamedTuple):
    """Candidates with what their users think of them."""

    first: np.ndarray
    """int64 [L + 1]."""
    utility: np.ndarray
    """The user's own score of each candidate, fp64 [N]; larger is better."""
    user_ids: np.ndarray
    """User id of each list, str [L]."""
    prompts: np.ndarray
    """Prompt of each list, int64 [L]: lists of one prompt stand or fall together."""

    def take(self, chosen: np.ndarray) -> tuple["Lists", np.ndarray]:
        """The lists where `chosen` [L] holds, and the places of their candidates."""
        sizes = np.diff(self.first)
        places = np.flatnonzero(np.repeat(chosen, sizes))
        first = np.concatenate([[0], np.cumsum(sizes[chosen])])
        ids, prompts = self.user_ids[chosen], self.prompts[chosen]
        return Lists(first, self.utility[places], ids, prompts), places

    def indifferent(self) -> np.ndarray:
        """Lists in which the user likes all candidates equally, bool [L]: no choice is better than another."""
        starts = self.first[:-1]
        return np.maximum.reduceat(self.utility, starts) == np.minimum.reduceat(
            self.utility, starts
        )


def best_of_n_figures(
    lists: Lists, scores: np.ndarray, lengths: np.ndarray | None = None
) -> RankingFigures:
    """Measure how well `scores` [N] choose among the candidates: figures of `eval/NAME.json` under `--best_of_n`.

    Over lists that are not indifferent, means with a 95% interval clustered by prompt:
        top1                whether the candidate with the highest score is one of those the user likes best
        regret              utility of the user's best candidate less that of the chosen one
        regret_normalised   regret / (the user's best - the user's worst), in [0, 1]
        kendall_tau_b       rank correlation of scores and utilities, corrected for ties (Kendall 1945); 0 where all
                            scores are equal
    Among candidates of equal scores the choice is random: the expectation is taken. A score that is no number ranks
    below all others. Baselines: a candidate at random, in expectation; the longest by `lengths` [N], where known.
    """
    clear = ~lists.indifferent() if len(lists.user_ids) else np.zeros(0, bool)
    counts = {"lists": int(clear.sum()), "indifferent": int((~clear).sum())}
    if not clear.any():
        intervals = [f"{name}_ci95" for name in FIGURES]
        empty = dict.fromkeys([*FIGURES, *intervals, "baselines"])
        return cast(RankingFigures, {**counts, "candidates_mean": None, **empty, "users": {}})
    lists, places = lists.take(clear)
    per_list = _per_list(lists, scores[places])
    figures: dict[str, object] = {**counts, "candidates_mean": float(np.diff(lists.first).mean())}
    for name, values in zip(FIGURES, per_list, strict=True):
        low = -1.0 if name == "kendall_tau_b" else 0.0
        high = np.inf if name == "regret" else 1.0
        half = 1.96 * clustered_standard_error(values, lists.prompts)
        mean = float(values.mean())
        figures[name] = mean
        figures[f"{name}_ci95"] = [max(low, mean - half), float(min(high, mean + half))]
    figures["baselines"] = {
        "random": _means(_per_list(lists, np.zeros(len(places)))),
        "longest": None if lengths is None else _means(_per_list(lists, lengths[places])),
    }
    names, index = np.unique(lists.user_ids, return_inverse=True)
    by_user = [np.bincount(index, weights=values) / np.bincount(index) for values in per_list]
    figures["users"] = {
        str(name): {"lists": count, **dict(zip(FIGURES, row, strict=True))}
        for name, count, row in zip(
            names, np.bincount(index).tolist(), np.stack(by_user, axis=1).tolist(), strict=True
        )
    }
    return cast(RankingFigures, figures)


def _means(per_list: tuple[np.ndarray, ...]) -> RankingMeans:
    means = {name: float(values.mean()) for name, values in zip(FIGURES, per_list, strict=True)}
    return cast(RankingMeans, means)


def _per_list(lists: Lists, scores: np.ndarray) -> tuple[np.ndarray, ...]:
    """The FIGURES of each list, fp64 [L]."""
    scores = np.nan_to_num(scores, nan=-np.inf)
    starts, sizes = lists.first[:-1], np.diff(lists.first)
    best = np.maximum.reduceat(lists.utility, starts)
    worst = np.minimum.reduceat(lists.utility, starts)
    chosen = scores == np.repeat(np.maximum.reduceat(scores, starts), sizes)
    num_chosen = np.add.reduceat(chosen.astype(float), starts)
    favourite = lists.utility == np.repeat(best, sizes)
    top1 = np.add.reduceat((chosen & favourite).astype(float), starts) / num_chosen
    gained = np.add.reduceat(np.where(chosen, lists.utility, 0.0), starts) / num_chosen
    # What rounding of the mean over equal ones leaves is no gain beyond the best.
    regret = np.maximum(best - gained, 0.0)
    return top1, regret, regret / (best - worst), _kendall_tau_b(lists, scores)


def _kendall_tau_b(lists: Lists, scores: np.ndarray) -> np.ndarray:
    """(concordant - discordant) / sqrt(pairs not tied in scores * pairs not tied in utilities), fp64 [L]."""
    taus = np.zeros(len(lists.user_ids))
    sizes = np.diff(lists.first)
    for size in np.unique(sizes):
        one, other = np.triu_indices(size, k=1)
        alike = np.flatnonzero(sizes == size)
        for here in np.array_split(alike, -(-len(alike) * len(one) // PAIRS_AT_ONCE)):
            places = lists.first[here][:, None] + np.arange(size)
            by_score, by_utility = (
                _compared(values[places[:, one]], values[places[:, other]])
                for values in (scores, lists.utility)
            )
            agreement = (by_score * by_utility).sum(1)
            untied = np.abs(by_score).sum(1) * np.abs(by_utility).sum(1)
            taus[here] = agreement / np.sqrt(np.maximum(untied, 1))
    return taus


def _compared(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """+1 where the first is larger, -1 where it is smaller: a difference of two infinities would be no number."""
    return (one > other).astype(np.int8) - (one < other)
