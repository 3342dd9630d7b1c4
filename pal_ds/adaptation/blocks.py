"""Comparisons of many users as padded blocks of terms, users along the last axis: what the solver works on.

A term is one scored position that the loss weighs. Axes: B comparisons, U users, N terms, C comparisons of a user,
K prototypes, T positions.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.heads.sufficient_statistics import MixtureStatistics
from pal_ds.losses import PairFacts, TokenWeighting, token_weights
from pal_ds.tie_models import TieModel

FLOATS_PER_BLOCK = 2**20
"""Bytes of `linear` and `quadratic` in a block: 4 MB, so that steps are not memory-bound and calls are few."""


class UserComparisons(NamedTuple):
    """Comparisons of several users, beside their rewards."""

    user: Int[Tensor, "B"]
    """Index of the user who made the comparison."""
    facts: PairFacts
    threshold: Float[Tensor, "1"] | None = None
    """The threshold of ties, where the loss has one."""
    factor: Float[Tensor, "U"] | None = None
    """Of each user's margins: the exponential of the log of reliability; None where that is 1."""


class Block(NamedTuple):
    """Users with equally many terms after padding. Terms of weight 0 are padding."""

    users: Int[Tensor, "U"]
    linear: Float[Tensor, "r K N U"]
    """Coefficients of both responses (r = 2), or response_1 minus response_0 (r = 1) where a margin needs no more."""
    quadratic: Float[Tensor, "s K K C V"]
    """One for all (s = C = V = 1), or one (s = 1) or one per response (s = 2) of each comparison. V is U, or a
    divisor of U where as many users repeat."""
    comparison: Int[Tensor, "N U"] | None
    """Index of the user's comparison that a term belongs to; None where that is evident."""
    label: Float[Tensor, "N U"]
    """Times the factor of the user's margins."""
    required: Float[Tensor, "N U"]
    weight: Float[Tensor, "N U"]

    def take(self, lanes: Int[Tensor, "L"]) -> "Block":
        parts: list[Any] = [
            part
            if part is None or part.shape[-1] == 1
            else part.index_select(-1, lanes % part.shape[-1])
            for part in self
        ]
        return Block(*parts)

    def repeat(self, times: int) -> "Block":
        """The block of all of its users, so many times over; matrices, most of its size, are not copied."""
        parts: list[Any] = [
            part
            if part is None or name == "quadratic"
            else part.repeat(*[1] * (part.ndim - 1), times)
            for name, part in zip(self._fields, self, strict=True)
        ]
        return Block(*parts)


def padded_size(counts: Int[Tensor, "U"]) -> Int[Tensor, "U"]:
    """Each count rounded up by a quarter at most, so that few sizes occur; a function of the count alone."""
    step = torch.pow(2.0, (counts.clamp(min=1).float().log2().floor() - 2).clamp(min=0)).long()
    return (counts + step - 1) // step * step


def with_sure_labels(
    statistics: MixtureStatistics, comparisons: UserComparisons, ties: TieModel
) -> tuple[MixtureStatistics, UserComparisons]:
    """Comparisons with labels -1 and +1 whose weighted losses add up to those of the given ones, but for a constant.

    A soft label is one each way, by its shares. So is a tie: halves, or under `rao_kupper` two whole ones; there each
    needs a lead of the threshold.
    """
    facts, is_tie = comparisons.facts, comparisons.facts.label == 0
    required = facts.required_margin
    if ties == "rao_kupper":
        assert comparisons.threshold is not None, "a model of ties needs its threshold"
        required = required + comparisons.threshold
    if facts.target is None:
        return statistics, comparisons._replace(facts=facts._replace(required_margin=required))
    shares = torch.stack([facts.target.float(), 1 - facts.target.float()])
    if ties == "rao_kupper":
        shares = torch.where(is_tie, 1.0, shares)
    elif ties == "drop":
        shares = shares.masked_fill(is_tie, 0.0)
    both = facts._replace(
        label=torch.cat([torch.ones_like(facts.label), -torch.ones_like(facts.label)]),
        start=facts.start.repeat(2),
        end=facts.end.repeat(2),
        required_margin=required.repeat(2),
        weight=(shares * facts.weight).flatten(),
        target=None,
    )
    index = statistics.response_index.repeat(2, 1)
    user = comparisons.user.repeat(2)
    factor = comparisons.factor
    return statistics._replace(response_index=index), UserComparisons(user, both, factor=factor)


class PaddedTerms(NamedTuple):
    """Terms of users who have about as many; those of weight 0 are padding."""

    users: Int[Tensor, "U"]
    pair: Int[Tensor, "N U"]
    """Comparison of each term."""
    position: Int[Tensor, "N U"]
    weight: Float[Tensor, "N U"]


def padded_terms(
    comparisons: UserComparisons,
    num_users: int,
    weighting: TokenWeighting,
    *,
    num_positions: int,
    floats_per_term: int,
    floats_per_block: int = FLOATS_PER_BLOCK,
) -> Iterator[PaddedTerms]:
    """Every user with at least one term, each in one part of about `floats_per_block` floats at most."""
    facts = comparisons.facts
    weight = token_weights(weighting, facts.start, facts.end, num_positions) * facts.weight[:, None]
    pair, position = weight.nonzero(as_tuple=True)
    order = torch.argsort(comparisons.user[pair], stable=True)
    pair, position = pair[order], position[order]
    counts = torch.bincount(comparisons.user[pair], minlength=num_users)
    first = counts.cumsum(0) - counts
    sizes = padded_size(counts)
    for size in sizes.unique().tolist():
        users = (sizes == size).nonzero().squeeze(1)
        per_block = max(1, floats_per_block // (floats_per_term * max(size, 1)))
        for part in users.split(per_block) if size else ():
            place = torch.arange(size, device=pair.device)[:, None]
            valid = place < counts[part]
            term = torch.where(valid, first[part] + place, first[part])
            rows, columns = pair[term], position[term]
            counted = torch.where(valid, weight[rows, columns], 0.0)
            yield PaddedTerms(part, rows, columns, counted)


def blocks(
    statistics: MixtureStatistics,
    comparisons: UserComparisons,
    num_users: int,
    weighting: TokenWeighting,
) -> Iterator[Block]:
    """Every user with at least one term, each in one block."""
    _, num_positions, num_prototypes = statistics.linear.shape
    own = _matrices_per_comparison(statistics) if num_positions == 1 else 0
    for terms in padded_terms(
        comparisons,
        num_users,
        weighting,
        num_positions=num_positions,
        floats_per_term=num_prototypes * (2 + num_prototypes * own),
    ):
        block = _block(statistics, comparisons.facts, *terms)
        if comparisons.factor is not None:
            block = block._replace(label=block.label * comparisons.factor[block.users])
        yield block


def _block(
    statistics: MixtureStatistics,
    facts: PairFacts,
    users: Int[Tensor, "U"],
    pair: Int[Tensor, "N U"],
    position: Int[Tensor, "N U"],
    weight: Float[Tensor, "N U"],
) -> Block:
    rows = statistics.response_index.T[:, pair]
    linear = statistics.linear[rows, position].permute(0, 3, 1, 2).contiguous()
    if statistics.shape != "distance" and _matrices_per_comparison(statistics) < 2:
        # Both cosines have one denominator: the margin is the difference over it. A linear one has none.
        linear = linear[1:] - linear[:1]
    quadratic, comparison = _quadratic(statistics, pair, rows)
    return Block(
        users,
        linear,
        quadratic,
        comparison,
        facts.label[pair].float(),
        facts.required_margin[pair].float(),
        weight,
    )


def _matrices_per_comparison(statistics: MixtureStatistics) -> int:
    """0 where all share one, 1 where the responses of each comparison do, as those to one prompt, or 2."""
    if len(statistics.quadratic) == 1:
        return 0
    first, second = statistics.quadratic_index[statistics.response_index].T
    return 1 if torch.equal(first, second) else 2


def _quadratic(
    statistics: MixtureStatistics, pair: Int[Tensor, "N U"], rows: Int[Tensor, "2 N U"]
) -> tuple[Float[Tensor, "s K K C U"], Int[Tensor, "N U"] | None]:
    if len(statistics.quadratic) == 1:
        return statistics.quadratic[0][None, :, :, None, None], None
    comparison = None
    if statistics.linear.shape[1] > 1:
        # Terms of a comparison lie together: a new one begins where the number changes.
        begins = torch.ones_like(pair, dtype=torch.bool)
        begins[1:] = pair[1:] != pair[:-1]
        comparison = begins.cumsum(0) - 1
        num_terms, num_comparisons = len(pair), int(comparison.max()) + 1
        where = torch.zeros(num_comparisons, pair.shape[1], dtype=torch.int64, device=pair.device)
        places = torch.arange(num_terms, device=pair.device)[:, None].expand_as(pair)
        where = where.scatter(0, comparison, places)
        rows = rows.gather(1, where.expand(2, *where.shape))
    rows = rows[: _matrices_per_comparison(statistics)]
    matrices = statistics.quadratic[statistics.quadratic_index[rows]]
    return matrices.permute(0, 3, 4, 1, 2).contiguous(), comparison
