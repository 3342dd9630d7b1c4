"""Rewards of many responses under many points: each response is encoded once, and then costs K numbers per point.

Axes: B points, R responses, K numbers of a point, C comparisons.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.collator import Collator
from pal_ds.distributed import phase
from pal_ds.heads.base import Features, Head, UserState
from pal_ds.heads.geometry import unit
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.heads.sufficient_statistics import RewardShape, combine
from pal_ds.model import RewardModel


class RewardTable(Protocol):
    """Responses that are scored under points."""

    def at(self, points: Float[Tensor, "B K"]) -> Float[Tensor, "B R"]:
        """The reward of each response at its last token under each point, fp32."""
        ...


class ByStatistics(NamedTuple):
    """Rewards from statistics: see `heads/sufficient_statistics.py`."""

    linear: Float[Tensor, "R K"]
    quadratic: Float[Tensor, "Q K K"]
    quadratic_index: Int[Tensor, "R"]
    shape: RewardShape

    def at(self, points: Float[Tensor, "B K"]) -> Float[Tensor, "B R"]:
        linear = points @ self.linear.T
        if self.shape == "linear":
            return linear
        squares = (points[:, :, None] * points[:, None]).flatten(1)
        form = squares @ self.quadratic.flatten(1).T
        if form.shape[1] > 1:
            form = form[:, self.quadratic_index]
        return combine(linear, form, self.shape)


class ByPlaces(NamedTuple):
    """Rewards by distance or cosine to a place that depends on the point alone: responses are projected once.

    Squares are expanded around the mean response, as in `heads/sufficient_statistics.py`.
    """

    head: Head
    response: Float[Tensor, "R d"]
    """Less `centre`; for cosines of length `scale`."""
    centre: Float[Tensor, "d"]
    by_distance: bool

    @torch.no_grad()
    def at(self, points: Float[Tensor, "B K"]) -> Float[Tensor, "B R"]:
        located = self.head.locate(UserState(None, None, points))
        assert located is not None, "a head that locates a point locates all"
        place = located.float() - self.centre
        linear, form = place @ self.response.T, place.square().sum(1, keepdim=True)
        if self.by_distance:
            linear = self.response.square().sum(1) + form - 2 * linear
            form = torch.zeros_like(form)
        return combine(linear, form, "distance" if self.by_distance else "cosine")


class ByHead(NamedTuple):
    """Rewards by the head itself, for one without statistics."""

    head: Head
    parts: list[tuple[Features, Int[Tensor, "r"]]]
    """See `table_of`."""

    @torch.no_grad()
    def at(self, points: Float[Tensor, "B K"]) -> Float[Tensor, "B R"]:
        rewards = []
        for features, last in self.parts:
            shape = len(points), len(last)
            prompts = features.prompt_index
            everything = features._replace(
                response_index=features.response_index.T.expand(shape),
                prompt_index=None if prompts is None else prompts.T.expand(shape),
            )
            reward = self.head.reward(everything, UserState(None, None, points))
            rewards.append(reward.gather(2, last.expand(shape).unsqueeze(2)).squeeze(2))
        return torch.cat(rewards, 1)


class ScoredPairs(NamedTuple):
    """Comparisons between the responses of a table."""

    table: RewardTable
    sides: Int[Tensor, "C 2"]
    """Responses of each comparison, as columns of the table's rewards."""

    def margins(self, points: Float[Tensor, "B K"]) -> Float[Tensor, "B C"]:
        """Reward of response_2 less that of response_1, under each point."""
        rewards = self.table.at(points)
        first, second = self.sides.unbind(1)
        return rewards.index_select(1, second).sub_(rewards.index_select(1, first))


@torch.no_grad()
def scored_pairs(
    model: RewardModel, collator: Collator, rows: np.ndarray, pairs_per_forward: int
) -> ScoredPairs:
    """Read the responses of the comparisons `rows`, each once, so that they can be scored under any points.

    Args:
        model: the run's model.
        collator: reads the comparisons.
        rows: of the comparisons table, at least one.
        pairs_per_forward: how many of them are read together.
    """
    model.eval()
    table = collator.data.comparisons[rows]
    codes = np.stack([table["a"], table["b"]], 1)
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    # A response is read where it is met first; columns are in the order of these places.
    is_first = np.zeros(codes.size, bool)
    is_first[first] = True
    column = (np.cumsum(is_first) - 1)[first]
    parts = list(_parts(model, collator, rows, is_first.reshape(codes.shape), pairs_per_forward))
    sides = torch.from_numpy(column[inverse.reshape(codes.shape)])
    return ScoredPairs(table_of(model.head, parts), sides.to(parts[0][1].device))


def _parts(
    model: RewardModel,
    collator: Collator,
    rows: np.ndarray,
    is_first: np.ndarray,
    pairs_per_forward: int,
) -> Iterator[tuple[Features, Int[Tensor, "r"]]]:
    """Features whose comparisons are one response each, in order, and the last scored position of each."""
    device = next(model.head.parameters()).device
    for begin in range(0, len(rows), pairs_per_forward):
        phase.progress()
        part = rows[begin : begin + pairs_per_forward]
        chosen = torch.from_numpy(is_first[begin : begin + pairs_per_forward]).to(device)
        if not chosen.any():
            continue
        batch = collator(part, np.arange(len(part))).to(device)
        features = model.backbone(batch)
        prompts = features.prompt_index
        single = features._replace(
            response_index=features.response_index[chosen][:, None],
            prompt_index=None if prompts is None else prompts[chosen][:, None],
        )
        # Positions past the end of a response repeat its last one.
        ends = batch.window_end[:, None].expand_as(chosen)[chosen]
        yield single, (ends - 1).clamp(min=0)


def table_of(head: Head, parts: list[tuple[Features, Int[Tensor, "r"]]]) -> RewardTable:
    """The cheapest table of a head's rewards for these responses.

    Args:
        head: in eval mode.
        parts: features of some responses, each with its own prompt as a comparison of one, and their last positions.
    """
    shape: RewardShape = "linear"
    linear, matrices, indices, num_matrices = [], [], [], 0
    for features, last in parts:
        statistics = head.statistics(features)
        if statistics is None:
            return _by_places(head, parts) or ByHead(head, parts)
        rows, shape = statistics.response_index[:, 0], statistics.shape
        linear.append(statistics.linear[rows, last])
        indices.append(statistics.quadratic_index[rows] + num_matrices)
        matrices.append(statistics.quadratic)
        num_matrices += len(statistics.quadratic)
    quadratic, index = torch.cat(matrices), torch.cat(indices)
    if all(len(one) == 1 and torch.equal(one, matrices[0]) for one in matrices):
        quadratic, index = matrices[0], torch.zeros_like(index)
    return ByStatistics(torch.cat(linear), quadratic, index, shape)


def _by_places(head: Head, parts: list[tuple[Features, Int[Tensor, "r"]]]) -> ByPlaces | None:
    """None for a head whose places depend on more than the point, or whose rewards are of another form."""
    device = next(head.parameters()).device
    even = torch.full((1, head.num_prototypes), 1 / head.num_prototypes, device=device)
    if head.locate(UserState(None, None, even)) is None:
        return None
    responses, scale = [], None
    for features, last in parts:
        # A placement is of two responses; here they are the same.
        twice = features._replace(
            response_index=features.response_index.expand(-1, 2),
            prompt_index=None
            if features.prompt_index is None
            else features.prompt_index.expand(-1, 2),
        )
        placement = head.place(twice, UserState(None, None, even.expand(len(last), -1)))
        if placement is None:
            return None
        scale = placement.scale
        responses.append(placement.response[placement.response_index[:, 0], last].float())
    response = torch.cat(responses)
    if scale is not None:
        return ByPlaces(head, scale * unit(response), torch.zeros_like(response[0]), False)
    centre = response.mean(0)
    return ByPlaces(head, response - centre, centre, True)
