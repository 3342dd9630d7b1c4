"""From a user's logits w_u to the point s_u over K prototypes: a mixture, or weights of any sign.

Of the kinds, `softmax` is s = softmax(w / tau), a point of the simplex. `signed` is its tangent at even weights, where
w = 0: s = (1 + w / tau) / K, or with w - mean(w) in place of w for a head whose weights must sum to 1. `free` is
signed, and a new user may have a direction of their own beside the K: K weights, then d numbers.
"""

from typing import Literal, get_args

from torch import Tensor, nn

from .base import UserState
from .checks import check_choice, check_positive
from .jaxtyping_fallback import Float
from .sufficient_statistics import PointSpace, point_of

MixtureKind = Literal["softmax", "gumbel", "signed", "free"]
MixtureEvaluation = Literal["soft", "hard"]


class Mixture(nn.Module):
    """s_u from w_u; no parameters, a module only so that it follows train() and eval().

    `gumbel` adds the given noise in training, softmax((w_u + g) / tau) (arXiv 1611.01144). `hard`
    evaluation takes the largest logit alone. A mixture given explicitly replaces all of it.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        kind: MixtureKind = "softmax",
        evaluation: MixtureEvaluation = "soft",
        *,
        sums_to_one: bool = False,
        is_linear: bool = False,
    ):
        """`sums_to_one`: signed weights do, too. `is_linear`: the head's reward is linear in the user's vector.

        Raises ValueError for a choice that is unknown or makes no sense.
        """
        super().__init__()
        check_positive("temperature", temperature)
        check_choice("mixture", kind, get_args(MixtureKind))
        check_choice("evaluation", evaluation, get_args(MixtureEvaluation))
        if kind in ("signed", "free") and evaluation == "hard":
            raise ValueError(
                f"evaluation is 'hard', the largest weight alone, which is no approximation of {kind} weights: "
                "set evaluation to soft, or mixture to softmax or gumbel."
            )
        if kind == "free" and not is_linear:
            raise ValueError(
                "mixture is 'free', a direction of the user's own, which this head has no room for: its reward is not "
                "linear in the user's vector. Use signed here, or the head Lore."
            )
        self.needs = frozenset({"logits", "gumbel"} if kind == "gumbel" else {"logits"})
        """Entries that the user state must carry, as in `Head.needs`."""
        self.temperature = temperature
        self.kind = kind
        self.evaluation = evaluation
        self.space: PointSpace = "simplex"
        """Where points lie, as in `Head.space`."""
        if kind in ("signed", "free"):
            self.space = "affine" if sums_to_one else "linear"

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
        return point_of(logits, self.space, self.temperature)
