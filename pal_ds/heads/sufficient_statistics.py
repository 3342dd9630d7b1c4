"""All that a reward says about a mixture: K numbers per scored position and one K x K matrix for many of them.

Where a user's point is a = sum_k s_k p_k with sum_k s_k = 1, the projected response z enters a reward through K
numbers alone, whatever the width of the space:
    -||z - a||        = -sqrt(sum_k s_k ||z - p_k||^2 - s^T D s / 2)          D_kl = ||p_k - p_l||^2
    scale cos(z, a)   = scale sum_k s_k <z / |z|, p_k> / sqrt(s^T G s)        G_kl = <p_k, p_l>
(the first is Leibniz' theorem on weighted points). Fitting a new user then costs K operations per position and not d.
Of a cosine or of sum_k s_k r_k itself, weights of any sum are as good.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .geometry import take, unit
from .jaxtyping_fallback import Float, Int

SMALLEST_SQUARE = 1e-12
"""Below this a squared distance or norm counts as zero: its reward is flat there."""

PointSpace = Literal["simplex", "affine", "linear"]
"""Weights of K prototypes that are at least 0 and sum to 1; that sum to 1; any. See `mixture.py`."""
RewardShape = Literal["distance", "cosine", "linear"]
"""How a reward depends on the weights s: the two above, or sum_k s_k linear_k itself."""


class MixtureStatistics(NamedTuple):
    """Everything that a head's rewards depend on beside a user's mixture. Axes as in `base.py`; Q matrices."""

    linear: Float[Tensor, "N T K"]
    """||z - p_k||^2, scale <z / |z|, p_k>, or the reward of p_k alone: of each distinct response, with its prompt where
    that matters."""
    response_index: Int[Tensor, "B r"]
    """Row of `linear` of each response of each comparison."""
    quadratic: Float[Tensor, "Q K K"]
    """D or G; of a linear reward nothing reads it."""
    quadratic_index: Int[Tensor, "N"]
    """Matrix of each row of `linear`."""
    shape: RewardShape
    temperature: float
    """tau of `point_of`."""
    space: PointSpace = "simplex"
    """Where users' points lie. By distance they must sum to 1."""

    def reward(self, mixture: Float[Tensor, "B K"]) -> Float[Tensor, "B r T"]:
        """The head's rewards of each comparison under the given mixtures, in the statistics' dtype."""
        linear = torch.einsum("bk,brtk->brt", mixture, take(self.linear, self.response_index))
        if self.shape == "linear":
            return linear
        matrices = self.quadratic[self.quadratic_index[self.response_index]]
        form = torch.einsum("bk,brkl,bl->br", mixture, matrices, mixture).unsqueeze(-1)
        return combine(linear, form, self.shape)

    def points(self, logits: Float[Tensor, "*n K"]) -> Float[Tensor, "*n K"]:
        """The points that these logits stand for, in the logits' dtype."""
        return point_of(logits, self.space, self.temperature)


def point_of(
    logits: Float[Tensor, "*n K"], space: PointSpace, temperature: float, axis: int = -1
) -> Float[Tensor, "*n K"]:
    """softmax(w / tau); (1 + w / tau) / K; or the latter of w - mean(w). K is the size of `axis`.

    >>> point_of(torch.tensor([1.0, -1.0]), "linear", 1.0).tolist()
    [1.0, 0.0]
    """
    if space == "simplex":
        return torch.softmax(logits / temperature, axis)
    if space == "affine":
        logits = logits - logits.mean(axis, keepdim=True)
    return (1 + logits / temperature) / logits.shape[axis]


def combine(
    linear: Float[Tensor, "*n"], form: Float[Tensor, "*#n"], shape: RewardShape
) -> Float[Tensor, "*n"]:
    """The reward from sum_k s_k linear_k and s^T quadratic s."""
    if shape == "linear":
        return linear
    if shape == "distance":
        return -(linear - form / 2).clamp(min=SMALLEST_SQUARE).sqrt()
    return linear * torch.where(
        form > SMALLEST_SQUARE, form.clamp(min=SMALLEST_SQUARE).rsqrt(), 0.0
    )


def distance_statistics(
    response: Float[Tensor, "R T d"],
    index: Int[Tensor, "B r"],
    points: Float[Tensor, "K d"],
    temperature: float,
    space: PointSpace = "simplex",
) -> MixtureStatistics:
    """Statistics of minus the distance to the mixed point, fp32; squares are expanded around the mean point.

    The expansion errs by about 1e-7 times the squared distance to the mean point.
    """
    points = points.float()
    centre = points.mean(0)
    points, response = points - centre, response.float() - centre
    squares = response.square().sum(-1, keepdim=True) + points.square().sum(-1)
    linear = (squares - 2 * response @ points.T).clamp(min=0)
    quadratic = (points[:, None] - points).square().sum(-1)
    shared = torch.zeros(len(linear), dtype=torch.int64, device=linear.device)
    quadratic = quadratic.unsqueeze(0)
    return MixtureStatistics(linear, index, quadratic, shared, "distance", temperature, space)


def cosine_statistics(
    response: Float[Tensor, "R T d"],
    index: Int[Tensor, "B r"],
    points: Float[Tensor, "Q K d"],
    owner: Int[Tensor, "R"],
    scale: Float[Tensor, "1"],
    temperature: float,
    space: PointSpace = "simplex",
) -> MixtureStatistics:
    """Statistics of the scaled cosine with the mixed point, fp32; `owner` names each response's set of K points."""
    points, direction = points.float(), unit(response)
    shared = len(points) == 1
    linear = (
        direction @ points[0].T
        if shared
        else torch.einsum("rtd,rkd->rtk", direction, points[owner])
    )
    gram = points @ points.mT
    return MixtureStatistics(scale * linear, index, gram, owner, "cosine", temperature, space)
