"""VPL: a latent user variable inferred from a few of the user's comparisons (arXiv 2408.10075).

    q(z | context) = N(mu, diag exp(logvar))     z = mu + exp(logvar / 2) noise in training, mu elsewhere
    loss = -log sigmoid(r(x_2, z) - r(x_1, z)) + kl_weight s(t) KL(q || N(0, 1))
with s(t) a schedule over updates. A user without comparisons has the prior's mean, z = 0.
"""

import math
from typing import ClassVar, Literal, final, get_args

import torch
from torch import Tensor, nn

from .base import Features, Head, HeadOutput, UserState
from .checks import check_choice, check_not_negative, check_positive
from .context_encoder import ContextEncoder, ContextSymmetry
from .geometry import take
from .jaxtyping_fallback import Float
from .latent_user import KlSchedule, context_ends, given_point, kl_share, reads_points

RewardForm = Literal["bilinear", "mlp"]


@final
class Vpl(Head):
    """Reward <W h(x), z> / sqrt(L) + <v, h(x)>, or an MLP of [h(x); z]; z from the user's context by attention.

    The published form (`symmetry: none`, `reward_form: mlp`) starts at a saddle: its first z says next to nothing of
    the user, so a z-blind reward fits best, and then nothing asks z to say more. Where users disagree as often as they
    agree it stays there. Either default leads away from it: an encoder that is odd under swapping preferred and
    rejected starts out as a contrast of the two, a bilinear reward depends on z from the start.
    """

    needs: frozenset[str] = frozenset({"context", "normal"})
    family: ClassVar[str] = "vpl"
    space = "linear"

    def __init__(
        self,
        hidden_size: int,
        latent_dim: int = 32,
        width: int = 128,
        num_context: int = 8,
        num_context_scored: int = 8,
        symmetry: ContextSymmetry = "odd",
        reward_form: RewardForm = "bilinear",
        kl_weight: float = 1e-3,
        kl_schedule: KlSchedule = "constant",
        kl_period: int = 10_000,
        swap_guidance: float = 0.0,
    ):
        """Raises ValueError for an impossible size or an unknown choice.

        Args:
            hidden_size: H.
            latent_dim: L, the size of z.
            width: of the hidden layers of encoder and reward.
            num_context: comparisons of the user per comparison in training, drawn anew each epoch.
            num_context_scored: comparisons that stand for a user in evaluation, one draw each.
            symmetry: `odd`: swapping preferred and rejected turns mu around and leaves logvar; `none`.
            reward_form: `bilinear` or `mlp`.
            kl_weight: of the divergence from the prior, summed over L.
            kl_schedule: s(t): 1; t / kl_period up to 1; or cyclic from 0.1 to 1 by half a cosine.
            kl_period: updates of a ramp or a cycle.
            swap_guidance: weight of SPL's guide for an encoder without that symmetry (arXiv 2603.12595): the mean of
                (1 + cos(mu, mu swapped)) / 2 and (1 - cos(logvar, logvar swapped)) / 2, added.
        """
        super().__init__()
        sizes = {"latent_dim": latent_dim, "width": width, "kl_period": kl_period}
        sizes |= {"num_context": num_context, "num_context_scored": num_context_scored}
        for name, value in {"hidden_size": hidden_size, **sizes}.items():
            check_positive(name, value)
        check_choice("reward_form", reward_form, get_args(RewardForm))
        check_choice("kl_schedule", kl_schedule, get_args(KlSchedule))
        check_not_negative("kl_weight", kl_weight)
        check_not_negative("swap_guidance", swap_guidance)
        self.num_prototypes = latent_dim
        self.num_context, self.num_context_scored = num_context, num_context_scored
        self.kl_weight, self.kl_period = kl_weight, kl_period
        self.kl_schedule: KlSchedule = kl_schedule
        self.swap_guidance = swap_guidance
        self.encoder = ContextEncoder(hidden_size, width, latent_dim, symmetry)
        self.reward_form = reward_form
        if reward_form == "bilinear":
            self.map = nn.Linear(hidden_size, latent_dim + 1, bias=False)
        else:
            self.of_response = nn.Linear(hidden_size, width)
            self.of_latent = nn.Linear(latent_dim, width, bias=False)
            self.rest = nn.Sequential(
                nn.LeakyReLU(0.2), nn.Linear(width, width), nn.LeakyReLU(0.2), nn.Linear(width, 1)
            )

    def mixture_weights(self, user: UserState) -> Float[Tensor, "B K"]:
        """The point given, or kept in a table in place of logits."""
        return given_point(user)

    def encode(self, features: Features, user: UserState) -> Float[Tensor, "B K"]:
        """mu of each context, fp32; 0 for an empty one."""
        return self.encoder(*context_ends(features, user))[0]

    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """Compute rewards for the given points, or for those of the given contexts; fp32."""
        known = reads_points(user)
        point = given_point(user) if known else self.encode(features, user)
        return self._reward(features, point)

    def compare(self, features: Features, user: UserState) -> HeadOutput:
        """Compare as `Head.compare` does; with a context also the divergence as the penalty and mu as the point."""
        if user.context is None or user.mixture is not None:
            return super().compare(features, user)
        pairs = context_ends(features, user)
        mu, logvar = self.encoder(*pairs)
        noise = user.normal if self.training else None
        z = mu if noise is None else mu + torch.exp(logvar / 2) * noise.float()
        reward = self._reward(features, z)
        divergence = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)
        penalty = (
            self.kl_weight * kl_share(self.kl_schedule, self.kl_period, user.update) * divergence
        )
        if self.swap_guidance:
            penalty = penalty + self.swap_guidance * self._swap_guide(pairs, mu, logvar)
        return HeadOutput(reward, reward[:, 1] - reward[:, 0], penalty, None, mu)

    def _reward(self, features: Features, point: Float[Tensor, "B K"]) -> Float[Tensor, "B r T"]:
        index = features.response_index
        # States may be fp32 where a bf16 run has vectors for data.
        response = features.response.to(next(self.parameters()).dtype)
        if self.reward_form == "bilinear":
            mapped = take(self.map(response).float(), index)
            personal = torch.einsum("bk,brtk->brt", point, mapped[..., :-1])
            return personal / math.sqrt(self.num_prototypes) + mapped[..., -1]
        mapped = take(self.of_response(response).float(), index)
        latent = self.of_latent(point.to(response.dtype)).float()
        return self.rest((mapped + latent[:, None, None]).to(response.dtype))[..., 0].float()

    def _swap_guide(
        self, pairs: tuple[Tensor, Tensor, Tensor], mu: Tensor, logvar: Tensor
    ) -> Float[Tensor, "B"]:
        preferred, rejected, length = pairs
        mu_swapped, logvar_swapped = self.encoder(rejected, preferred, length)
        cosine = nn.functional.cosine_similarity
        turned = (1 + cosine(mu, mu_swapped, dim=-1)) / 2
        kept = (1 - cosine(logvar, logvar_swapped, dim=-1)) / 2
        return torch.where(length > 0, (turned + kept) / 2, 0.0)
