"""The contract of a head: features and a user's state in, one reward per response and scored position out.

Needs torch alone and imports only its siblings, so that an exported folder can carry these very files.
It knows nothing of backbones, batches, losses, engines or how users are stored.

Axes: B comparisons, r responses per comparison, R distinct responses, P distinct prompts, T scored positions of
a response, C positions of a prompt, H hidden size, d reward space, K prototypes.

Named tuples, not dataclasses: the hooks of ZeRO-3 find the tensors of a module's inputs and outputs in tuples, and
miss them elsewhere (a parameter is then not gathered for backward). Pass them positionally for the same reason.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .jaxtyping_fallback import Float, Int
from .sufficient_statistics import MixtureStatistics, PointSpace


class Features(NamedTuple):
    """States of the distinct texts of a batch, and which comparison reads which of them."""

    response: Float[Tensor, "R T H"]
    """Hidden states at the scored positions of each distinct response; positions past its end are padding."""
    response_index: Int[Tensor, "B r"]
    prompt: Float[Tensor, "P C H"] | None = None
    """Hidden states of each distinct prompt: its last token (C = 1), or all of them for `aligned`."""
    prompt_index: Int[Tensor, "B r"] | None = None
    prompt_length: Int[Tensor, "P"] | None = None
    """Valid positions of each prompt, at least 1."""


class UserState(NamedTuple):
    """Facts that a head may read about the user of each comparison; `Head.needs` names those it reads."""

    logits: Float[Tensor, "B K"] | None = None
    """w_u, fp32."""
    gumbel: Float[Tensor, "B K"] | None = None
    """Standard Gumbel noise, keyed by (seed, update, comparison); given in training only."""
    mixture: Float[Tensor, "B K"] | None = None
    """The user's point, in place of what a head would make of the rest: scoring and export. For most heads a point of
    the simplex, in place of softmax(w_u / tau). K + `Head.residual_size` numbers where users have directions of their
    own."""
    context: Int[Tensor, "B N 2"] | None = None
    """Other comparisons of the user: rows of `Features.response` that were preferred and rejected."""
    context_length: Int[Tensor, "B"] | None = None
    """Number of the N that are there; 0 for a user of whom nothing is known."""
    group: Int[Tensor, "B"] | None = None
    """Group of each comparison; -1 where it has none."""
    normal: Float[Tensor, "B K"] | None = None
    """Standard normal noise, keyed by (seed, update, comparison); given in training only."""
    update: int | None = None
    """Number of the update, for schedules; given in training only."""
    log_reliability: Float[Tensor, "B"] | None = None
    """r_u, fp32: the model multiplies margins by exp(r_u). No head reads it."""
    log_tie_threshold: Float[Tensor, "B"] | None = None
    """q_u, fp32: the model multiplies the threshold of ties by exp(q_u). No head reads it."""


class HeadOutput(NamedTuple):
    """Output of a head that training and evaluation read."""

    reward: Float[Tensor, "B r T"]
    margin: Float[Tensor, "B T"]
    """Log-odds (under the logistic loss) that response_2 is preferred to response_1."""
    penalty: Float[Tensor, "B"]
    """Regulariser per comparison, added to its loss; zeros where a head has none."""
    total: Float[Tensor, ""] | None = None
    """The weighted sum of losses where a fused pair loss made it; reward and margin then carry no gradients."""
    point: Float[Tensor, "B K"] | None = None
    """Each user's point where the head made it from the context, without noise."""
    threshold: Float[Tensor, "1"] | Float[Tensor, "B 1"] | None = None
    """The threshold of ties, which the model adds in training where the loss has one; of each comparison's user where
    users have their own."""


class Placement(NamedTuple):
    """Places of responses and users: all that a reward by distance or by cosine depends on."""

    response: Float[Tensor, "R T d"]
    response_index: Int[Tensor, "B 2"]
    point: Float[Tensor, "B g d"]
    """The user's point, one for both responses (g = 1) or one for each (g = 2)."""
    scale: Float[Tensor, "1"] | None
    """Scale of the cosine; None for minus the distance."""


PairLoss = Callable[[Placement], tuple[Tensor, Tensor, Tensor, Tensor]]
"""Function from a placement to (total, loss [B], reward [B, 2, T], margin [B, T]); only the total has gradients."""


class Head(nn.Module, ABC):
    """Maps features and user state to rewards. Concrete heads are final; share by composition, not by subclassing."""

    needs: frozenset[str]
    """Subset of {"prompt", "prompt_tokens", "logits", "gumbel", "context", "group", "normal"}: what Features and
    UserState must carry. `prompt_tokens` asks for every position of the prompt instead of its last."""
    family: ClassVar[str] = ""
    """Names under which `reward_models.py` makes this head."""
    num_prototypes: int
    """K, the width of a user's point and logits; 1 for a head without users."""
    space: PointSpace = "simplex"
    """Where users' points lie: mixtures, at least 0 and summing to 1; weights that sum to 1; or any K numbers."""
    temperature: float = 1.0
    """tau of `mixture.py`, for a head whose points are made of logits."""
    residual_size: int = 0
    """d, where new users may have a direction of their own: their logits and points are K + d numbers, of which the
    latter are that direction."""
    has_statistics: bool = False
    """True if the rewards depend on a mixture through K numbers per position, whatever the features."""
    num_context: int = 0
    """N, how many of a user's comparisons a head that needs `context` reads in training."""
    num_context_scored: int = 0
    """Number of context comparisons in evaluation, where one draw stands for a user."""

    @abstractmethod
    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """Reward of each response of each comparison for its user, fp32."""

    @property
    def is_personal(self) -> bool:
        """True if rewards depend on a point of K numbers."""
        return not self.needs.isdisjoint({"logits", "context", "group"})

    @property
    def point_sizes(self) -> tuple[int, ...]:
        """How many numbers a user's point may have: K, or K + d with a direction of the user's own."""
        sizes = (self.num_prototypes, self.num_prototypes + self.residual_size)
        return sizes if self.residual_size else sizes[:1]

    @property
    def on_simplex(self) -> bool:
        """True if users' points are mixtures."""
        return self.space == "simplex"

    @property
    def has_points(self) -> bool:
        """True if the point is the user's own: looked up, fitted or made from comparisons."""
        return not self.needs.isdisjoint({"logits", "context"})

    def compare(self, features: Features, user: UserState) -> HeadOutput:
        """Rewards, margins and penalties of comparisons; a margin is a difference of rewards unless overridden."""
        reward = self.reward(features, user)
        return HeadOutput(reward, reward[:, 1] - reward[:, 0], self.penalty(user, reward))

    def penalty(self, user: UserState, reward: Float[Tensor, "B r T"]) -> Float[Tensor, "B"]:
        """Regulariser per comparison; zeros unless the head overrides it."""
        return reward.new_zeros(reward.shape[0])

    def mixture_weights(self, user: UserState) -> Float[Tensor, "B K"]:
        """The point s_u this head uses for each user; all ones for a head without users.

        For a head that reads no logits, those of a table that was never trained: the point of a user of whom nothing
        is known.
        """
        given = user.mixture if user.mixture is not None else user.logits
        num_rows = 1 if given is None else len(given)
        return torch.ones(num_rows, 1, device=next(self.parameters()).device)

    def encode(self, features: Features, user: UserState) -> Float[Tensor, "B K"]:
        """The point of each user from the user's comparisons, for a head that needs `context`; without noise."""
        raise NotImplementedError(f"{type(self).__name__} reads no context")

    def linear_weight(self) -> Float[Tensor, "H"] | None:
        """v where the reward is <v, h(x)> for everyone, so that an export can be a stock class."""
        return None

    def place(self, features: Features, user: UserState) -> Placement | None:
        """The placement of two responses, for a head whose margin is a difference of distances or cosines."""
        return None

    def statistics(self, features: Features) -> MixtureStatistics | None:
        """These numbers, in place of features, for a head that has them; else None. Without dropout: in eval mode."""
        return None

    def residual_features(self, features: Features) -> Float[Tensor, "R T d"] | None:
        """Features that a user's own direction is multiplied by, of each response; for a head with `residual_size`."""
        return None

    def locate(self, user: UserState) -> Float[Tensor, "B d"] | None:
        """The user's point of the space of `place`, for a head where it depends on the user alone."""
        return None

    def forward(
        self, features: Features, user: UserState, pair_loss: PairLoss | None = None
    ) -> HeadOutput:
        """The only way in under ZeRO-3: parameters are gathered for the length of this call.

        With a pair loss, a head that can place its responses lets it make the loss.
        """
        placement = None if pair_loss is None else self.place(features, user)
        if pair_loss is not None and placement is not None:
            total, _, reward, margin = pair_loss(placement)
            return HeadOutput(reward, margin, self.penalty(user, reward), total)
        return self.compare(features, user)
