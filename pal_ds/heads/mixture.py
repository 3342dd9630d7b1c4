"""From a user's logits w_u to the point s_u of the simplex over K prototypes."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .base import UserState
from .checks import check_choice, check_positive
from .jaxtyping_fallback import Float

MixtureKind = Literal["softmax", "gumbel"]
MixtureEvaluation = Literal["soft", "hard"]


class Mixture(nn.Module):
    """s_u = softmax(w_u / tau); no parameters, a module only so that it follows train() and eval().

    `gumbel` adds the given noise in training, softmax((w_u + g) / tau) (arXiv 1611.01144). `hard`
    evaluation takes the largest logit alone. A mixture given explicitly replaces all of it.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        kind: MixtureKind = "softmax",
        evaluation: MixtureEvaluation = "soft",
    ):
        """Raises ValueError for a temperature that is not above 0 or an unknown choice."""
        super().__init__()
        check_positive("temperature", temperature)
        check_choice("mixture", kind, get_args(MixtureKind))
        check_choice("evaluation", evaluation, get_args(MixtureEvaluation))
        self.needs = frozenset({"logits", "gumbel"} if kind == "gumbel" else {"logits"})
        """Entries that the user state must carry, as in `Head.needs`."""
        self.temperature = temperature
        self.kind = kind
        self.evaluation = evaluation

    def forward(self, user: UserState) -> Float[Tensor, "B K"]:
        """Weights in fp32. Raises ValueError where the state has neither logits nor mixture."""
        if user.mixture is not None:
            return user.mixture.float()
        if user.logits is None:
            raise ValueError(
                "this head needs a user: the user state holds neither logits nor a mixture; pass one of the two."
            )
        logits = user.logits.float()
        if self.training:
            if self.kind == "gumbel" and user.gumbel is not None:
                logits = logits + user.gumbel.float()
        elif self.evaluation == "hard":
            return nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
        return torch.softmax(logits / self.temperature, dim=-1)
