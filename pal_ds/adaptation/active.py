"""Few-shot curves whose comparisons are chosen by a strategy, and how they compare with a random choice.

Each user begins as the run's typical user; what the strategy chooses out of the user's own pool is answered as the data
have it, the user is fitted again, and so on. A label is read once its comparison is chosen, not before.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from pal_ds.adaptation.chooser import Chooser, Users
from pal_ds.adaptation.fit import Solver, UserPairs, fit_users, pairs_per_chunk
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.adaptation.strategies import STRATEGIES, Prompts, Strategy
from pal_ds.adaptation.user_posteriors import posterior_of_users, why_no_posterior
from pal_ds.errors import UserError
from pal_ds.eval.schema import CurvePoint, GainOverRandom, StrategyFigures
from pal_ds.heads.base import UserState
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.inference.load_run import OpenRun
from pal_ds.inference.readers import Reader
from pal_ds.inference.rewards_at import scored_pairs
from pal_ds.progress import progress_bar

USERS_PER_BLOCK = 16
"""Users whose pools are scored together; each is scored on the pools of all of them."""
SHARE_AT_ONCE = 8
"""A user is fitted again after each comparison up to twice as many, then after every 1 / SHARE_AT_ONCE more."""
REACHED = 0.9
"""Share of random's gain that a strategy must reach, for `comparisons_to_reach`."""


def refuse_strategies(restored: OpenRun, strategies: Sequence[Strategy]) -> None:
    """Raise UserError for an unknown strategy, or one that needs users' posteriors where the run gives none."""
    for name in strategies:
        if name not in STRATEGIES:
            raise UserError(f"--strategy {name}: must be of {', '.join(STRATEGIES)}.")
    chosen = [name for name in strategies if name != "random"]
    if len({*strategies}) < len(strategies):
        raise UserError(
            f"--strategy {','.join(strategies)}: names one of them twice. Name each once."
        )
    if chosen and (reason := why_no_posterior(restored.parts.head, restored.config.loss)):
        raise UserError(
            f"--strategy {chosen[0]}: this run's users have no posterior: {reason}. Leave --strategy out."
        )


class NewUsersPool(NamedTuple):
    """Held-out users with the comparisons that they may be asked."""

    restored: OpenRun
    reader: Reader
    rows: Int[np.ndarray, "n"]
    """Of the comparisons table; `reader.collator.user_rows` numbers their users from 0."""
    num_users: int
    solver: Solver

    @property
    def owner(self) -> Int[np.ndarray, "n"]:
        """User of each row."""
        return self.reader.collator.user_rows(self.rows)

    def drawn(
        self, strategy: Strategy, draws: Sequence[tuple[int, int]]
    ) -> list[Int[np.ndarray, "m"]]:
        """Rows of the first `count` comparisons of every user, of each (count, seed)."""
        seeds = dict.fromkeys(seed for _, seed in draws)
        most = max(count for count, _ in draws)
        with progress_bar(f"asking by {strategy}", len(seeds), shown=True, unit="draws") as advance:
            places = {}
            for seed in seeds:
                places[seed] = self._places(strategy, most, seed)
                advance(1)
        return [self.rows[places[seed] < count] for count, seed in draws]

    def _places(self, strategy: Strategy, most: int, seed: int) -> Int[np.ndarray, "n"]:
        """When each row is asked, from 0; `most` or more where it is not."""
        ids = [str(user) for user in range(self.num_users)]
        users, blocks = self._fitted(ids, np.empty(0, np.int64)), self._blocks(strategy, seed)
        owner, num_chosen = self.owner, 0
        place = np.full(len(owner), np.iinfo(np.int64).max)
        while num_chosen < most:
            num = min(max(1, num_chosen // SHARE_AT_ONCE), most - num_chosen)
            for begin, rows, chooser in blocks:
                part = slice(begin, begin + USERS_PER_BLOCK)
                some = users.some(part)
                own = owner[rows] == np.arange(begin, begin + len(some.ids))[:, None]
                free = torch.from_numpy(own & (place[rows] > num_chosen))
                size = min(num, len(rows))
                candidates = chooser._replace(num=size).choose(some, free).candidate
                # Who has nothing left is not asked.
                answered = free.gather(1, candidates).numpy()
                order = np.broadcast_to(num_chosen + np.arange(size), answered.shape)
                place[rows[candidates.numpy()[answered]]] = order[answered]
            num_chosen += num
            if place.max() < num_chosen:
                break  # everything is answered
            if num_chosen < most:
                users = self._fitted(users.ids, np.flatnonzero(place < num_chosen))
        return place

    def _blocks(self, strategy: Strategy, seed: int) -> list[tuple[int, np.ndarray, Chooser]]:
        """(first user, places in `rows` of the block's pool, what chooses from it)."""
        model, collator = self.reader.model, self.reader.collator
        data, blocks = collator.data, []
        for begin in range(0, self.num_users, USERS_PER_BLOCK):
            chosen = np.flatnonzero(self.owner // USERS_PER_BLOCK == begin // USERS_PER_BLOCK)
            if len(chosen) == 0:
                continue
            rows = self.rows[chosen]
            size = pairs_per_chunk(model.head, collator, rows)
            scored = scored_pairs(model, collator, rows, size)
            prompts = torch.zeros(int(scored.sides.max()) + 1, dtype=torch.int64)
            for side, name in enumerate(("a", "b")):
                codes = data.response_prompt[data.comparisons[rows][name]]
                prompts[scored.sides[:, side].cpu()] = torch.from_numpy(codes)
            of_device = Prompts.of(prompts.to(scored.sides.device))
            blocks.append((begin, chosen, Chooser(strategy, 1, seed, scored, of_device)))
        return blocks

    def _fitted(self, ids: list[str], answered: Int[np.ndarray, "m"]) -> Users:
        """The users after the comparisons at these places of `rows`."""
        model, collator, config = self.reader.model, self.reader.collator, self.restored.config
        pairs = UserPairs(self.rows[answered], self.owner[answered], self.num_users)
        prior, loss = LogitPrior.of(self.restored.users), config.loss
        prior = replace(prior, reliability_variance=self.restored.reliability_variance)
        fitted = fit_users(model, collator, pairs, loss=loss, prior=prior, solver=self.solver)
        sure = posterior_of_users(model, collator, pairs, fitted, loss=loss, prior=prior)
        model.head.eval()
        with torch.no_grad():
            point = model.head.mixture_weights(UserState(fitted.logits))
        return Users(ids, point, sure.covariance, fitted.log_reliability)


def against_random(
    curve: Sequence[CurvePoint],
    right: Float[np.ndarray, "k n"],
    random: Float[np.ndarray, "k n"],
    standard_error: Callable[[np.ndarray], float] | None,
) -> StrategyFigures:
    """A strategy's curve beside that of random choices, on the same test pairs.

    Args:
        curve: the strategy's own.
        right: correctness of each test pair at each k, mean over draws.
        random: the same of random choices.
        standard_error: of a mean over test pairs, with those of a user or prompt together; None gives no intervals.
    """
    differences: list[GainOverRandom] = []
    for point, own, other in zip(curve, right, random, strict=True):
        mean, interval = float((own - other).mean()), None
        if standard_error is not None:
            half = 1.96 * standard_error(own - other)
            interval = [mean - half, mean + half]
        differences.append(
            {
                "num_comparisons": point["num_comparisons"],
                "difference": mean,
                "difference_ci95": interval,
            }
        )
    counts = [point["num_comparisons"] for point in curve]
    return {
        "curve": list(curve),
        "against_random": differences,
        "comparisons_to_reach": comparisons_to_reach(counts, right.mean(1), random.mean(1)),
        "random_comparisons_to_reach": comparisons_to_reach(counts, random.mean(1), random.mean(1)),
    }


def comparisons_to_reach(
    counts: Sequence[int], accuracy: Float[np.ndarray, "k"], random: Float[np.ndarray, "k"]
) -> float | None:
    """The number of comparisons after which `accuracy` has REACHED of the gain that random has at the largest count.

    Between two counts it goes straight. None where it never has, or random gains nothing.
    """
    order = np.argsort(counts, kind="stable")
    k, own, base = np.asarray(counts, float)[order], accuracy[order], random[order]
    wanted = base[0] + REACHED * (base[-1] - base[0])
    if base[-1] <= base[0]:
        return None
    reached = np.flatnonzero(own >= wanted)
    if len(reached) == 0:
        return None
    last = int(reached[0])
    if last == 0:
        return float(k[0])
    share = (wanted - own[last - 1]) / (own[last] - own[last - 1])
    return float(k[last - 1] + share * (k[last] - k[last - 1]))


def strategy_lines(name: str, figures: StrategyFigures) -> list[str]:
    """Lines for people."""
    lines = [f"chosen by {name}:"]
    for point, gain in zip(figures["curve"], figures["against_random"], strict=True):
        shown = "(too few users or prompts for an interval)"
        if gain["difference_ci95"] is not None:
            low, high = gain["difference_ci95"]
            shown = f"[{100 * low:+.2f}, {100 * high:+.2f}]"
        lines.append(
            f"{point['num_comparisons']:4d} comparisons: accuracy {point['accuracy']:.4f}, "
            f"{100 * gain['difference']:+.2f} points against random {shown}"
        )
    own, random = figures["comparisons_to_reach"], figures["random_comparisons_to_reach"]
    if random is not None:
        said = "never" if own is None else f"after {own:.1f} comparisons"
        lines.append(f"nine tenths of the random gain: {said}; random after {random:.1f}")
    return lines
