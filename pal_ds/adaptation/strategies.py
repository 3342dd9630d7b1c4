"""Which comparison to ask a user for next, out of a pool: what its answer would tell of the user's point.

All read two things of a candidate: its margin at the fitted point, and its slopes, the change of the margin along
each axis of the user's posterior, a standard deviation long; the sum of their squares is the margin's variance. So
linear and nonlinear rewards, and any kind of point, go the same way.

Several candidates are chosen one after the other; after each, the posterior is as it will be on average once it is
answered (a rank-one update, whatever the answer), so that a batch does not ask the same thing twice.
Axes: U users, C candidates, D axes of the posterior, M draws, R responses.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pal_ds.heads.jaxtyping_fallback import Bool, Float, Int

Strategy = Literal["random", "d_optimal", "bald", "thompson"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
"""`random`: any. `d_optimal`: least determinant of the posterior covariance. `bald`: largest mutual information of
answer and point (Houlsby et al., arXiv 1112.5745). `thompson`: duels of responses to one prompt that are each the best
under a draw of the posterior (Wu and Liu, arXiv 1604.07101)."""

PROBIT = math.pi / 8
"""sigmoid(m) is nearly Phi(m sqrt(PROBIT)): MacKay 1992."""
_HOULSBY = math.pi * math.log(2) / 2
LEAST_DUEL = 1e-6
"""Chance of a duel that no draw shows: such candidates come last, in random order."""


class Choice(NamedTuple):
    """Candidates for each user, the one to ask first at the front."""

    candidate: Int[Tensor, "U N"]
    gain: Float[Tensor, "U N"]
    """What each was worth when it was chosen: nats for `d_optimal` and `bald`, the chance of the duel for `thompson`, 0
    for `random`."""


Gain = Callable[[Float[Tensor, "U C"], Float[Tensor, "U C"]], Float[Tensor, "U C"]]
"""What an answer tells, of candidates with these margins and their variances."""


def information(margin: Float[Tensor, "*n"], variance: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """E[p (1 - p)] of p = sigmoid(m), m ~ N(margin, variance): Fisher's information on the margin, by the probit."""
    shrink = torch.rsqrt(1 + PROBIT * variance)
    chance = torch.sigmoid(shrink * margin)
    return shrink * chance * (1 - chance)


def log_volume_gain(
    margin: Float[Tensor, "*n"], variance: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """By how much an answer lowers half the log determinant of the posterior covariance, in nats."""
    return 0.5 * torch.log1p(information(margin, variance) * variance)


def mutual_information(
    margin: Float[Tensor, "*n"], variance: Float[Tensor, "*n"]
) -> Float[Tensor, "*n"]:
    """Entropy of the answer less its mean entropy given the point, in nats; both by Houlsby's Gaussian.

    Of p = Phi(x) the entropy is nearly ln 2 exp(-x^2 / (pi ln 2)); the same for both terms, so that an answer to what
    is known exactly tells nothing.
    """
    squared, spread = PROBIT * margin.square(), PROBIT * variance
    answer = torch.exp(-squared / (1 + spread) / (2 * _HOULSBY))
    wide = _HOULSBY + spread
    given = torch.exp(-squared / (2 * wide)) * torch.sqrt(_HOULSBY / wide)
    return math.log(2) * (answer - given)


GAINS: dict[str, Gain] = {"d_optimal": log_volume_gain, "bald": mutual_information}


@torch.no_grad()
def choose_by_gain(
    margin: Float[Tensor, "U C"],
    slopes: Float[Tensor, "U D C"],
    num: int,
    gain_of: Gain,
    available: Bool[Tensor, "U C"],
) -> Choice:
    """The candidates of largest gain, one after the other; of equals the first.

    Of a user with fewer than `num` available the last are any, with gains of -inf.
    """
    num_users, num_axes, _ = slopes.shape
    everyone = torch.arange(num_users, device=margin.device)
    shrunk = torch.eye(num_axes, device=margin.device).repeat(num_users, 1, 1)
    variance, available = slopes.square().sum(1), available.clone()
    chosen, gains = [], []
    for _ in range(num):
        gain = gain_of(margin, variance).masked_fill(~available, -torch.inf)
        gain, best = gain.max(1)
        chosen.append(best)
        gains.append(gain)
        available[everyone, best] = False
        if len(chosen) == num:
            break
        slope = slopes[everyone, :, best]
        along = torch.bmm(shrunk, slope.unsqueeze(2))
        own = (along.squeeze(2) * slope).sum(1).clamp(min=0)
        informed = information(margin[everyone, best], own)
        factor = informed / (1 + informed * own)
        cross = torch.bmm(along.mT, slopes).squeeze(1)
        variance = torch.addcmul(variance, factor[:, None] * cross, cross, value=-1).clamp_(min=0)
        shrunk -= factor[:, None, None] * (along @ along.mT)
    return Choice(torch.stack(chosen, 1), torch.stack(gains, 1))


def choose_at_random(
    noise: Float[Tensor, "U C"], num: int, available: Bool[Tensor, "U C"]
) -> Choice:
    """Candidates in the order of `noise`, which makes all orders equally likely."""
    order = noise.masked_fill(~available, torch.inf).topk(num, 1, largest=False).indices
    return Choice(order, torch.zeros_like(order, dtype=noise.dtype))


class Prompts(NamedTuple):
    """Responses by prompt."""

    members: Int[Tensor, "P n"]
    """Responses to each prompt; the rest of a row repeats its first."""
    is_member: Bool[Tensor, "P n"]

    @staticmethod
    def of(prompt_of_response: Int[Tensor, "R"]) -> "Prompts":
        order = torch.argsort(prompt_of_response, stable=True)
        _, counts = torch.unique_consecutive(prompt_of_response[order], return_counts=True)
        place = torch.arange(int(counts.max()), device=order.device)
        is_member = place < counts[:, None]
        first = (counts.cumsum(0) - counts)[:, None]
        return Prompts(order[torch.where(is_member, first + place, first)], is_member)

    def shares_of_best(self, rewards: Float[Tensor, "U M R"]) -> Float[Tensor, "U R"]:
        """Share of the draws under which each response is the best of its prompt's; the first of equals."""
        of_prompt = rewards[:, :, self.members].masked_fill(~self.is_member, -torch.inf)
        best = self.members.expand(*of_prompt.shape[:2], -1, -1)
        best = best.gather(3, of_prompt.argmax(3, keepdim=True)).flatten(2)
        shares = rewards.new_zeros(len(rewards), rewards.shape[2])
        ones = rewards.new_full((1, 1), 1 / rewards.shape[1]).expand(len(rewards), best[0].numel())
        return shares.scatter_add_(1, best.flatten(1), ones)


def choose_duels(
    shares: Float[Tensor, "U R"],
    sides: Int[Tensor, "C 2"],
    noise: Float[Tensor, "U C"],
    num: int,
    available: Bool[Tensor, "U C"],
) -> Choice:
    """Candidates drawn without repeats, each as likely as two draws of the posterior make it a duel of their bests.

    Args:
        shares: of draws under which a response is the best to its prompt.
        sides: responses of each candidate.
        noise: uniform in (0, 1).
        num: how many are chosen for each user.
        available: which candidates a user may be asked.
    """
    chance = 2 * shares[:, sides[:, 0]] * shares[:, sides[:, 1]]
    # The order of Gumbel noise on log weights is that of draws without replacement (Yellott 1977).
    gumbel = -torch.log(-torch.log(noise.clamp(1e-7, 1 - 1e-7)))
    order = (chance + LEAST_DUEL).log() + gumbel
    best = order.masked_fill(~available, -torch.inf).topk(num, 1).indices
    return Choice(best, chance.gather(1, best))
