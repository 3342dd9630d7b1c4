"""From a set of a user's comparisons to a normal distribution over the user's latent variable."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .checks import check_choice
from .jaxtyping_fallback import Bool, Float, Int

ContextSymmetry = Literal["odd", "none"]


class ContextEncoder(nn.Module):
    """A block of attention over the N comparisons, then their mean: no order, no loop over users (arXiv 2408.10075).

    h_n = MLP([preferred_n; rejected_n]);  o = mean_n softmax(Q h K h^T / sqrt(L)) V h;  mu, logvar linear in o.
    `odd`: with g = this network, mu = (g(p, r) - g(r, p)) / 2 and logvar = (g(p, r) + g(r, p)) / 2.
    """

    def __init__(
        self, hidden_size: int, width: int, latent_dim: int, symmetry: ContextSymmetry
    ) -> None:
        """Raises ValueError for an unknown symmetry."""
        super().__init__()
        check_choice("symmetry", symmetry, get_args(ContextSymmetry))
        self.symmetry = symmetry
        self.pair = three_layers(2 * hidden_size, width, latent_dim)
        self.query = nn.Linear(latent_dim, latent_dim)
        # A key's bias would add the same to all weights of a row.
        self.key = nn.Linear(latent_dim, latent_dim, bias=False)
        self.value = nn.Linear(latent_dim, latent_dim)
        self.moments = nn.Linear(latent_dim, 2 * latent_dim)

    def forward(
        self,
        preferred: Float[Tensor, "B N H"],
        rejected: Float[Tensor, "B N H"],
        length: Int[Tensor, "B"],
    ) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        """(mu, logvar), fp32, of the first `length` comparisons; the prior's zeros where there are none."""
        there = torch.arange(preferred.shape[1], device=length.device) < length.unsqueeze(-1)
        mu, logvar = self._moments(preferred, rejected, there)
        if self.symmetry == "odd":
            other_mu, other_logvar = self._moments(rejected, preferred, there)
            mu, logvar = (mu - other_mu) / 2, (logvar + other_logvar) / 2
        known = length.unsqueeze(-1) > 0
        return torch.where(known, mu, 0.0), torch.where(known, logvar, 0.0)

    def _moments(
        self,
        first: Float[Tensor, "B N H"],
        second: Float[Tensor, "B N H"],
        there: Bool[Tensor, "B N"],
    ) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        h = self.pair(torch.cat([first, second], dim=-1).to(self.query.weight.dtype))
        mean = attend(h, there, (self.query, self.key, self.value))
        mu, logvar = self.moments(mean.to(h.dtype)).float().chunk(2, dim=-1)
        return mu, logvar


def three_layers(input_size: int, width: int, output_size: int) -> nn.Sequential:
    """The MLP that makes a code of a comparison, or of a response: two hidden layers with leaky ReLU of slope 0.2."""
    return nn.Sequential(
        nn.Linear(input_size, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, output_size),
    )


def attend(
    h: Float[Tensor, "B N L"],
    there: Bool[Tensor, "B N"],
    maps: tuple[nn.Module, nn.Module, nn.Module],
) -> Float[Tensor, "B L"]:
    """mean_n softmax(Q h K h^T / sqrt(L)) V h over the N that are there, fp32; 0 where none is. Maps are Q, K, V."""
    query, key, value = maps
    weight = (query(h) @ key(h).mT).float() / math.sqrt(h.shape[-1])
    # Finite, so that a user without any comparison has no NaN in the gradient either.
    weight = weight.masked_fill(~there.unsqueeze(1), torch.finfo(torch.float32).min)
    seen = torch.softmax(weight, dim=-1) @ value(h).float()
    return mean_of_those_there(seen, there)


def mean_of_those_there(
    values: Float[Tensor, "B N L"], there: Bool[Tensor, "B N"]
) -> Float[Tensor, "B L"]:
    """Mean over the N that are there; 0 where none is."""
    count = there.sum(1, keepdim=True).clamp(min=1)
    return (values * there.unsqueeze(-1)).sum(1) / count
