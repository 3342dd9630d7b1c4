"""From margins to one loss per comparison: three loss shapes, three ways to weigh token positions.

margin = reward of response_2 - reward of response_1, in log-odds; label +1 means response_2 is
preferred, -1 response_1, 0 neither. Knows nothing of heads, users or batches. Axes: B comparisons, T
positions.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from pal_ds.errors import UserError
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.tie_models import WITH_THRESHOLD, TieModel, tie_loss, win_loss

LossKind = Literal["logistic", "hinge", "smooth_hinge"]
TokenWeighting = Literal["last", "mean", "cumulative"]
OWN = "own"
"""`kind` of a loss with a shape of its own."""


def logistic(m: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """-log sigmoid(m)."""
    return -nn.functional.logsigmoid(m)


def hinge(m: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """max(0, 1 - m)."""
    return nn.functional.relu(1 - m)


def smooth_hinge(m: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """1/2 - m up to 0, (1 - m)^2 / 2 up to 1, then 0 (Rennie and Srebro 2005)."""
    short = nn.functional.relu(1 - m)
    return torch.where(short < 1, short.square() / 2, short - 0.5)


class MarginLoss(ABC):
    """A loss of one's own in the signed margin, for `loss.shape`: a subclass, named by its import path.

    Its constructor's arguments are `init_args` in the recipe. It holds no weights that are trained.
    """

    @abstractmethod
    def __call__(self, margin: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
        """The loss of each signed margin, elementwise, fp32, finite and with a gradient everywhere.

        A margin is positive where the preferred response has the larger reward, less the margin that the annotation
        requires.
        """


_LOSSES = {"logistic": logistic, "hinge": hinge, "smooth_hinge": smooth_hinge}


class PairFacts(NamedTuple):
    """Facts about each comparison that a loss reads beside its margins."""

    label: Int[Tensor, "B"]
    """+1 where response_2 is preferred, -1 where response_1, 0 where neither."""
    start: Int[Tensor, "B"]
    end: Int[Tensor, "B"]
    """The window of scored positions is [start, end); an empty one has loss 0."""
    required_margin: Float[Tensor, "B"]
    """How far apart the preferred response must be to satisfy the annotation."""
    weight: Float[Tensor, "B"]
    """Factor of the comparison's loss in the total; 0 for the stand-in of an empty run."""
    target: Float[Tensor, "B"] | None = None
    """Share of the preference that response_2 has, in [0, 1]; None where every label is sure (-1 or +1)."""


@dataclass(frozen=True)
class PreferenceLoss:
    """The loss of a comparison: weighted over positions, not yet averaged over comparisons."""

    kind: LossKind = "logistic"
    """Shape in the signed margin. Only `logistic` makes margins log-odds."""
    token_weighting: TokenWeighting = "last"
    """Positions of the window that count, see `token_weights`."""
    lm_weight: float = 0.0
    """Weight of the language-model loss of the preferred response: the mean cross-entropy of its tokens, its end token
    too, given the prompt (decoders that are trained). The model adds it; 0 loads no output layer."""
    shape: MarginLoss | None = None
    """A loss of one's own in the signed margin, in place of `kind`: {class_path: my_loss.MyLoss, init_args: {}}."""
    ties: TieModel = "half"
    """What a tie says: `half` a preference each way, nothing (`drop`), or, with a learnt threshold and margins in
    log-odds, as Rao and Kupper (`rao_kupper`) or Davidson (`davidson`) have it, see `tie_models.py`."""

    def __post_init__(self) -> None:
        """Raises UserError for an unknown choice."""
        if self.shape is not None:
            if self.kind not in ("logistic", OWN):
                raise UserError(f"loss.kind is {self.kind!r} beside loss.shape. Give one of them.")
            # Whoever asks for `logistic`, as margins are log-odds then, or for a closed form must not get it.
            object.__setattr__(self, "kind", OWN)
        else:
            _choose("kind", self.kind, _LOSSES)
        _choose("token_weighting", self.token_weighting, _WEIGHTS)
        _choose("ties", self.ties, dict.fromkeys(get_args(TieModel)))
        if self.has_threshold and self.kind != "logistic":
            raise UserError(
                f"loss.ties: {self.ties} needs margins in log-odds. Set loss.kind to logistic, or loss.ties to half."
            )
        if not self.lm_weight >= 0:
            raise UserError(f"loss.lm_weight is {self.lm_weight}; it must be 0 or more.")

    @property
    def has_threshold(self) -> bool:
        """True where ties have a threshold that is learnt."""
        return self.ties in WITH_THRESHOLD

    def __call__(
        self,
        margin: Float[Tensor, "B T"],
        label: Int[Tensor, "B"],
        start: Int[Tensor, "B"],
        end: Int[Tensor, "B"],
        required_margin: Float[Tensor, "B"] | None = None,
        *,
        target: Float[Tensor, "B"] | None = None,
        threshold: Float[Tensor, "1"] | Float[Tensor, "B 1"] | None = None,
    ) -> Float[Tensor, "B"]:
        """sum_t weight_t * loss(label * margin_t - required_margin), fp32.

        With `target`, the share of the preference that response_2 has, the loss of a comparison is the mean of both
        labels' by their shares; a tie has the loss that `ties` says, under the given `threshold`: one for all, or one
        for each comparison.

        label is -1 or +1; the window is [start, end). required_margin is how far apart the
        preferred response must be to satisfy the annotation (0 where unset). Positions outside the
        window reach neither value nor gradient, whatever they hold.
        """
        outside, weight = _window(self.token_weighting, start, end, margin.shape[1])
        margin, label = margin.float(), label.unsqueeze(-1)
        needed = None if required_margin is None else required_margin.float().unsqueeze(-1)
        if self.kind == "hinge" and target is None:
            # w max(0, 1 + r - y m) = max(0, w (1 + r) - w y m) as w >= 0: two steps of the graph
            # in place of four, which is what a loss of four pairs costs. Linear up to the mask, so
            # that what lies outside, be it NaN, meets only finite factors on the way back.
            most = weight if needed is None else weight * (1 + needed)
            slack = torch.addcmul(most, weight * label, margin, value=-1)
            return slack.masked_fill(outside, 0.0).relu().sum(-1)
        # Before anything is computed from them: what lies outside may be NaN, and 0 * NaN is NaN.
        margin, weight = margin.masked_fill(outside, 0.0), weight.masked_fill(outside, 0.0)
        if target is not None or self.has_threshold:
            return (weight * self._soft(margin, label, needed, target, threshold)).sum(-1)
        signed = label * margin
        if needed is not None:
            signed = signed - needed
        return (weight * (self.shape or _LOSSES[self.kind])(signed)).sum(-1)

    def _soft(
        self,
        margin: Float[Tensor, "B T"],
        label: Int[Tensor, "B one"],
        needed: Float[Tensor, "B one"] | None,
        target: Float[Tensor, "B"] | None,
        threshold: Float[Tensor, "1"] | Float[Tensor, "B 1"] | None,
    ) -> Float[Tensor, "B T"]:
        """The loss at each position of comparisons that may be ties, or have soft labels."""
        second, first = (margin, -margin) if needed is None else (margin - needed, -margin - needed)
        is_tie = label == 0
        share = (label + 1) / 2 if target is None else target.float().unsqueeze(-1)
        if not self.has_threshold:
            shape = self.shape or _LOSSES[self.kind]
            loss = share * shape(second) + (1 - share) * shape(first)
            return loss.masked_fill(is_tie, 0.0) if self.ties == "drop" else loss
        assert threshold is not None, "a model of ties needs its threshold"
        up, down = (win_loss(lead, threshold, self.ties) for lead in (second, first))
        return torch.where(
            is_tie, tie_loss(margin, threshold, self.ties), share * up + (1 - share) * down
        )


def token_weights(
    weighting: TokenWeighting,
    start: Int[Tensor, "B"],
    end: Int[Tensor, "B"],
    num_positions: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "B T"]:
    """Weight of each position, fp32 or fp64: sums to 1 in [start, end), 0 outside and in empty windows.

    With n = end - start and t counted from start: `last` 1 at t = n - 1; `mean` 1 / n; `cumulative`
    (t + 1) / (n (n + 1) / 2), the closed form of the reference's running sum.

    >>> weights = token_weights("cumulative", torch.tensor([1]), torch.tensor([4]), num_positions=5)
    >>> [round(weight, 4) for weight in weights[0].tolist()]
    [0.0, 0.1667, 0.3333, 0.5, 0.0]
    """
    if dtype == torch.float64:
        start, end = start.to(dtype), end.to(dtype)
    outside, weight = _window(weighting, start, end, num_positions)
    return weight.to(dtype).masked_fill(outside, 0.0)


def _window(
    weighting: TokenWeighting, start: Tensor, end: Tensor, num_positions: int
) -> tuple[Tensor, Tensor]:
    """(whether a position has weight 0 [B, T] bool, weights of the others, fp32, [B, T] or [B, 1]).

    In few operations, few of them over positions: on a small batch each costs as much as its
    arithmetic.
    """
    position = torch.arange(num_positions, device=start.device)
    start, end = start.unsqueeze(-1), end.unsqueeze(-1)
    beyond = position != end - 1 if weighting == "last" else position >= end
    return beyond.logical_or_(position < start), _WEIGHTS[weighting](position, start, end)


def decision_margin(margin: Float[Tensor, "B T"], end: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
    """The margin that decides a comparison in evaluation: the last position of its window, fp32.

    An exported model scores a response at its last token, so accuracy is read there whatever the
    token weighting of the loss; a positive value prefers response_2.
    """
    last = (end - 1).clamp(min=0).unsqueeze(-1)
    return margin.float().gather(1, last).squeeze(1)


# Of positions in windows, whatever they are outside. Counts stay int64 until the division: n (n + 1)
# leaves int32 at 46,341 tokens and exact fp32 at 4,096.
_WEIGHTS = {
    "last": lambda position, start, end: torch.ones(start.shape, device=start.device),
    "mean": lambda position, start, end: (end - start).clamp_(min=1).reciprocal(),
    "cumulative": lambda position, start, end: (position - (start - 1)) / _triangular(end - start),
}


def _triangular(n: Tensor) -> Tensor:
    """n (n + 1) / 2, at least 1."""
    return torch.addcmul(n, n, n).div_(2, rounding_mode="floor").clamp_(min=1)


def _choose(name: str, value: str, table: dict) -> None:
    if value not in table:
        raise UserError(f"loss.{name} is {value!r}; it must be one of {', '.join(table)}.")
