"""One step of an inverse autoregressive flow over users' latent variables, steered by the user's comparisons."""

from typing import final

import torch
from torch import Tensor, nn

from .jaxtyping_fallback import Float

HIDDEN_PER_UNIT = 2
"""Hidden units for each unit of z, as published."""
LARGEST_LOG_VARIANCE = 5.0


@final
class PairFlow(nn.Module):
    """P-IAF (arXiv 2603.12595): z'_i = m_i(z_<i, d) + exp(v_i(|z|_<i, s) / 2) z_i, units of z' then in reverse order.

    d turns around when a user's preferred and rejected responses are swapped, s does not. m is odd and v is even in z,
    so that the twin's z, which is -z, goes to -z' at the same density. This is exact by three choices of ours: tanh in
    m, as the published step has no biases there, |z| in v, and tanh in place of clamps at 1 and 5.
    """

    def __init__(self, latent_dim: int, code_dim: int) -> None:
        super().__init__()
        self.shift = _OrderedMap(latent_dim, code_dim, bias=False)
        self.log_variance = _OrderedMap(latent_dim, code_dim, bias=True)

    def forward(
        self, z: Float[Tensor, "B L"], contrast: Float[Tensor, "B C"], common: Float[Tensor, "B C"]
    ) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B"]]:
        """(z', log |det dz'/dz|), fp32; `contrast` is d and `common` is s."""
        half = LARGEST_LOG_VARIANCE / 2 * self.log_variance(z.abs(), common).tanh()
        return (self.shift(z, contrast).tanh() + half.exp() * z).flip(-1), half.sum(-1)


class _OrderedMap(nn.Module):
    """L numbers, of which number i reads a code and the units before i: a masked network of one hidden layer."""

    def __init__(self, latent_dim: int, code_dim: int, *, bias: bool) -> None:
        super().__init__()
        num_hidden = HIDDEN_PER_UNIT * latent_dim
        self.of_code = nn.Linear(code_dim, num_hidden, bias=bias)
        self.before = _MaskedLinear(latent_dim, num_hidden, own=False)
        self.out = _MaskedLinear(num_hidden, latent_dim, own=True)

    def forward(self, z: Float[Tensor, "B L"], code: Float[Tensor, "B C"]) -> Float[Tensor, "B L"]:
        of_code = self.of_code(code.to(self.of_code.weight.dtype)).float()
        return self.out(torch.tanh(self.before(z) + of_code))


class _MaskedLinear(nn.Linear):
    """A linear map without bias between units in order: a number reads those of the units before its own.

    With `own`, of its own unit too. Inputs and outputs are the units, each one number or a run of them. fp32.
    """

    def __init__(self, num_in: int, num_out: int, *, own: bool) -> None:
        super().__init__(num_in, num_out, bias=False)
        self.own = own

    def forward(self, input: Float[Tensor, "B n"]) -> Float[Tensor, "B m"]:
        (num_out, num_in), device = self.weight.shape, input.device
        num_units = min(num_in, num_out)
        unit_out = torch.arange(num_out, device=device) // (num_out // num_units)
        unit_in = torch.arange(num_in, device=device) // (num_in // num_units)
        before = unit_in < unit_out.unsqueeze(1) + self.own
        return nn.functional.linear(input, self.weight.float() * before)
