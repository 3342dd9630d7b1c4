"""The one module the engine shards: a backbone and a head, reached through a single forward."""

import functools
from typing import Any

from torch import Tensor, nn

from pal_ds.data.batch import Batch
from pal_ds.heads.base import Features, Head, HeadOutput, PairLoss, UserState
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.tie_models import TieThreshold


def user_state(
    batch: Batch,
    logits: Float[Tensor, "B K"] | None = None,
    *,
    mixture: Float[Tensor, "B K"] | None = None,
    update: int | None = None,
    log_reliability: Float[Tensor, "B"] | None = None,
) -> UserState:
    """Return what a model may know of the users of a batch; to a head, `mixture` stands in for all of it."""
    return UserState(
        logits=logits,
        gumbel=batch.gumbel,
        mixture=mixture,
        context=batch.context,
        context_length=batch.context_length,
        group=batch.group,
        normal=batch.normal,
        update=update,
        log_reliability=log_reliability,
    )


class RewardModel(nn.Module):
    """`forward` is the only way in: under ZeRO-3 parameters are gathered for the length of that call alone."""

    def __init__(
        self,
        backbone: nn.Module,
        head: Head,
        lm_weight: float = 0.0,
        tie_threshold: TieThreshold | None = None,
        feature_dropout: float = 0.0,
    ) -> None:
        """`lm_weight` > 0 needs a backbone with an output layer (`TransformerBackbone.language`).

        `feature_dropout` is the share of each state's numbers that the head does not see, in training.
        """
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.lm_weight = lm_weight
        self.tie_threshold = tie_threshold
        self.feature_dropout = feature_dropout

    def forward(
        self, batch: Batch, user: UserState, pair_loss: PairLoss | None = None
    ) -> HeadOutput:
        """Score a batch; in training with `lm_weight`, the penalty has the preferred responses' language-model loss."""
        output = self._scored(batch, user, pair_loss)
        if user.log_reliability is not None:
            assert output.total is None, "a fused loss knows nothing of reliability"
            factor = user.log_reliability.float().exp().unsqueeze(1)
            output = output._replace(margin=output.margin * factor)
        if self.tie_threshold is None or not self.training:
            return output
        threshold = self.tie_threshold()
        if user.log_tie_threshold is not None:
            threshold = threshold * user.log_tie_threshold.float().exp().unsqueeze(1)
        return output._replace(threshold=threshold)

    def _scored(self, batch: Batch, user: UserState, pair_loss: PairLoss | None) -> HeadOutput:
        if not (self.lm_weight and self.training):
            return self.head(self._dropped(self.backbone(batch)), user, pair_loss)
        backbone: Any = self.backbone
        features, token_losses = backbone.with_token_losses(batch)
        output = self.head(self._dropped(features), user, pair_loss)
        if batch.target is not None:
            token_losses = token_losses * (batch.label != 0)  # a tie has no preferred response
        return output._replace(penalty=output.penalty + self.lm_weight * token_losses)

    def _dropped(self, features: Features) -> Features:
        """The features as the head sees them in training; each distinct text loses the same for all who read it."""
        if not (self.feature_dropout and self.training):
            return features
        drop = functools.partial(nn.functional.dropout, p=self.feature_dropout)
        prompt = None if features.prompt is None else drop(features.prompt)
        return features._replace(response=drop(features.response), prompt=prompt)
