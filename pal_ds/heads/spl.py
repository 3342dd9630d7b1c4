"""SPL: VPL whose encoder sees a user beside a swapped twin, and whose posterior has a flow (arXiv 2603.12595).

    c = f(h), a code of each response of the context;  d = mean (c_preferred - c_rejected) / 2,  s = mean of their mean
    mu, logvar = attention over the context's [c_preferred; c_rejected], between -1 and 1;  mu', logvar' of the twin
    z = flows(mu + exp(logvar / 2) noise; d, s) in training, of mu elsewhere
    loss = -log sigmoid(r(x_2, z) - r(x_1, z)) + kl_weight s(t) max(free_nats, log q(z) - log N(z; 0, 1))
           + swap_guidance ((1 + cos(mu, mu')) / 2 + 0.1 (1 - cos(logvar, logvar')) / 2)
From the paper and its published code. Ours: `symmetry: odd`, `reward_form: bilinear`, tanh in place of clamps, the
order of a flow's units is reversed at each step where theirs is drawn, and the two choices of `pair_flow.py`.
"""

import math
from typing import ClassVar, Literal, NamedTuple, final, get_args

import torch
from torch import Tensor, nn

from .base import Features, Head, HeadOutput, UserState
from .checks import check_choice, check_not_negative, check_positive
from .context_encoder import attend, mean_of_those_there, three_layers
from .geometry import take
from .jaxtyping_fallback import Float, Int
from .latent_user import KlSchedule, context_ends, given_point, kl_share, reads_points
from .pair_flow import PairFlow

SwapSymmetry = Literal["odd", "guided"]
SplRewardForm = Literal["bilinear", "film"]
SHARE_OF_SPREAD = 0.1
"""Weight of logvar in the guide, as published."""


class _Base(NamedTuple):
    """The normal distribution before the flows, that of the swapped twin, and what steers the flows; fp32."""

    mu: Float[Tensor, "B L"]
    logvar: Float[Tensor, "B L"]
    mu_of_twin: Float[Tensor, "B L"]
    logvar_of_twin: Float[Tensor, "B L"]
    contrast: Float[Tensor, "B C"]
    common: Float[Tensor, "B C"]


@final
class Spl(Head):
    """Reward <W h(x), z> / sqrt(L) + <v, h(x)>, or an MLP of [h(x); z] whose last layer z scales and shifts (FiLM).

    The twin of a user has every comparison the other way round, hence the opposite taste: its z should be -z. `guided`
    asks the encoder for that by a term of the loss, as published; `odd` builds it in.
    """

    needs: frozenset[str] = frozenset({"context", "normal"})
    family: ClassVar[str] = "spl"
    space = "linear"

    def __init__(
        self,
        hidden_size: int,
        latent_dim: int = 32,
        width: int = 128,
        num_context: int = 8,
        num_context_scored: int = 8,
        num_flows: int = 2,
        symmetry: SwapSymmetry = "guided",
        reward_form: SplRewardForm = "film",
        kl_weight: float = 1e-3,
        kl_schedule: KlSchedule = "constant",
        kl_period: int = 10_000,
        free_nats: float = 1.0,
        swap_guidance: float = 0.1,
    ):
        """Raises ValueError for an impossible size or an unknown choice.

        Args:
            hidden_size: H.
            latent_dim: L, the size of z. A code of a response has half as many numbers.
            width: of the hidden layers of encoder and reward.
            num_context: comparisons of the user per comparison in training, drawn anew each epoch.
            num_context_scored: comparisons that stand for a user in evaluation, one draw each.
            num_flows: steps of the flow; 0 leaves the posterior normal.
            symmetry: `guided`, or `odd`: the twin's mu is -mu and its logvar is the same.
            reward_form: `film` or `bilinear`.
            kl_weight: of the divergence from the prior, summed over L.
            kl_schedule: s(t): 1; t / kl_period up to 1; or cyclic from 0.1 to 1 by half a cosine.
            kl_period: updates of a ramp or a cycle.
            free_nats: a divergence below this is not lowered any further.
            swap_guidance: weight of the guide, for `guided`.
        """
        super().__init__()
        sizes = {"latent_dim": latent_dim, "width": width, "kl_period": kl_period}
        sizes |= {"num_context": num_context, "num_context_scored": num_context_scored}
        for name, value in {"hidden_size": hidden_size, **sizes}.items():
            check_positive(name, value)
        check_choice("symmetry", symmetry, get_args(SwapSymmetry))
        check_choice("reward_form", reward_form, get_args(SplRewardForm))
        check_choice("kl_schedule", kl_schedule, get_args(KlSchedule))
        weights = {"kl_weight": kl_weight, "free_nats": free_nats, "swap_guidance": swap_guidance}
        for name, value in {"num_flows": num_flows, **weights}.items():
            check_not_negative(name, value)
        self.num_prototypes = latent_dim
        self.num_context, self.num_context_scored = num_context, num_context_scored
        self.kl_weight, self.kl_period = kl_weight, kl_period
        self.kl_schedule: KlSchedule = kl_schedule
        self.free_nats, self.swap_guidance = free_nats, swap_guidance
        self.is_guided = symmetry == "guided" and swap_guidance > 0
        self.encoder = _TwinEncoder(hidden_size, width, latent_dim, is_odd=symmetry == "odd")
        code_dim = self.encoder.code_dim
        self.flows = nn.ModuleList(PairFlow(latent_dim, code_dim) for _ in range(num_flows))
        form = _BilinearReward if reward_form == "bilinear" else _FilmReward
        self.reward_of = form(hidden_size, width, latent_dim)

    def mixture_weights(self, user: UserState) -> Float[Tensor, "B K"]:
        """The point given, or kept in a table in place of logits."""
        return given_point(user)

    def encode(self, features: Features, user: UserState) -> Float[Tensor, "B K"]:
        """z of each context without noise, fp32; 0 for an empty one."""
        base = self.encoder(*context_ends(features, user))
        return self._through_flows(base.mu, base)[0]

    def reward(self, features: Features, user: UserState) -> Float[Tensor, "B r T"]:
        """Compute rewards for the given points, or for those of the given contexts; fp32."""
        known = reads_points(user)
        point = given_point(user) if known else self.encode(features, user)
        return self.reward_of(features.response, features.response_index, point)

    def compare(self, features: Features, user: UserState) -> HeadOutput:
        """Compare as `Head.compare` does; with a context also the divergence and the guide, and the point."""
        if user.context is None or user.mixture is not None:
            return super().compare(features, user)
        base = self.encoder(*context_ends(features, user))
        point, log_volume = self._through_flows(base.mu, base)
        z, noise = point, torch.zeros_like(point)
        if user.normal is not None and self.training:
            noise = user.normal.float()
            z, log_volume = self._through_flows(base.mu + (base.logvar / 2).exp() * noise, base)
        reward = self.reward_of(features.response, features.response_index, z)
        # log q(z) - log N(z; 0, 1) at the z that was drawn; constants cancel.
        divergence = 0.5 * (z.square() - noise.square() - base.logvar).sum(-1) - log_volume
        share = self.kl_weight * kl_share(self.kl_schedule, self.kl_period, user.update)
        penalty = share * divergence.clamp(min=self.free_nats)
        if self.is_guided:
            penalty = penalty + self.swap_guidance * _guide(base)
        return HeadOutput(reward, reward[:, 1] - reward[:, 0], penalty, None, point)

    def _through_flows(self, z: Tensor, base: _Base) -> tuple[Tensor, Tensor]:
        log_volume = z.new_zeros(len(z))
        for flow in self.flows:
            z, of_flow = flow(z, base.contrast, base.common)
            log_volume = log_volume + of_flow
        return z, log_volume


class _TwinEncoder(nn.Module):
    """From a set of comparisons to the distribution before the flows, and to that of the twin."""

    def __init__(self, hidden_size: int, width: int, latent_dim: int, *, is_odd: bool) -> None:
        super().__init__()
        self.is_odd, self.code_dim = is_odd, (latent_dim + 1) // 2
        self.code = three_layers(hidden_size, width, self.code_dim)
        pair = 2 * self.code_dim
        self.query = nn.Linear(pair, pair)
        # A key's bias would add the same to all weights of a row.
        self.key = nn.Linear(pair, pair, bias=False)
        self.value = nn.Linear(pair, pair)
        self.moments = nn.Linear(pair, 2 * latent_dim)

    def forward(
        self,
        preferred: Float[Tensor, "B N H"],
        rejected: Float[Tensor, "B N H"],
        length: Int[Tensor, "B"],
    ) -> _Base:
        """Distributions and steers of the first `length` comparisons; zeros where there are none, as the prior has."""
        there = torch.arange(preferred.shape[1], device=length.device) < length.unsqueeze(-1)
        dtype = self.query.weight.dtype
        first, second = self.code(preferred.to(dtype)), self.code(rejected.to(dtype))
        mu, logvar = self._moments(first, second, there)
        # The twin is where mu should turn away from, no second way to learn.
        with torch.set_grad_enabled(self.is_odd and torch.is_grad_enabled()):
            twin_mu, twin_logvar = self._moments(second, first, there)
        if self.is_odd:
            mu, logvar = (mu - twin_mu) / 2, (logvar + twin_logvar) / 2
            twin_mu, twin_logvar = -mu, logvar
        known = (length > 0).unsqueeze(-1)
        moments = [torch.where(known, x.tanh(), 0.0) for x in (mu, logvar, twin_mu, twin_logvar)]
        steers = [
            mean_of_those_there(x.float() / 2, there) for x in (first - second, first + second)
        ]
        return _Base(*moments, *steers)

    def _moments(self, first: Tensor, second: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        pair = torch.cat([first, second], dim=-1)
        mean = attend(pair, there, (self.query, self.key, self.value))
        mu, logvar = self.moments(mean.to(pair.dtype)).float().chunk(2, dim=-1)
        return mu, logvar


class _BilinearReward(nn.Module):
    def __init__(self, hidden_size: int, width: int, latent_dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(hidden_size, latent_dim + 1, bias=False)

    def forward(
        self, response: Tensor, index: Int[Tensor, "B r"], z: Float[Tensor, "B L"]
    ) -> Float[Tensor, "B r T"]:
        mapped = take(self.map(response.to(self.map.weight.dtype)).float(), index)
        personal = torch.einsum("bk,brtk->brt", z, mapped[..., :-1])
        return personal / math.sqrt(z.shape[-1]) + mapped[..., -1]


class _FilmReward(nn.Module):
    """g = 1 + tanh(.) / 2 and b = tanh(.) / 2 of z;  reward = <w, leaky(g h + b)> + c, h an MLP of [h(x); z]."""

    def __init__(self, hidden_size: int, width: int, latent_dim: int) -> None:
        super().__init__()
        self.of_response = nn.Linear(hidden_size, width)
        self.of_latent = nn.Linear(latent_dim, width, bias=False)
        self.hidden = nn.Linear(width, width)
        self.film = nn.Sequential(
            nn.Linear(latent_dim, 2 * width), nn.LeakyReLU(0.2), nn.Linear(2 * width, 2 * width)
        )
        self.out = nn.Linear(width, 1)

    def forward(
        self, response: Tensor, index: Int[Tensor, "B r"], z: Float[Tensor, "B L"]
    ) -> Float[Tensor, "B r T"]:
        dtype, leaky = self.out.weight.dtype, nn.functional.leaky_relu
        mapped, z = self.of_response(response.to(dtype)), z.to(dtype)
        h = take(mapped, index) + self.of_latent(z)[:, None, None]
        h = leaky(self.hidden(leaky(h, 0.2)), 0.2)
        scale, shift = (self.film(z)[:, None, None].tanh() / 2).chunk(2, dim=-1)
        return self.out(leaky((1 + scale) * h + shift, 0.2))[..., 0].float()


def _guide(base: _Base) -> Float[Tensor, "B"]:
    cosine = nn.functional.cosine_similarity
    turned = (1 + cosine(base.mu, base.mu_of_twin, dim=-1)) / 2
    kept = (1 - cosine(base.logvar, base.logvar_of_twin, dim=-1)) / 2
    known = base.mu.any(-1)
    return torch.where(known, turned + SHARE_OF_SPREAD * kept, 0.0)
