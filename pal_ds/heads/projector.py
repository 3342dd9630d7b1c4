"""Projectors from a backbone's hidden space to the reward space: one, or K stored stacked.

K modules would cost K gathers per step under ZeRO-3, so the K projectors of PAL-B are one tensor per layer. Every
parameter belongs to a module whose own forward uses it, which is where ZeRO-3 gathers it.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .checks import check_choice, check_positive
from .jaxtyping_fallback import Float

Activation = Literal["relu", "gelu"]
_ACTIVATIONS = {"relu": nn.functional.relu, "gelu": nn.functional.gelu}


class Projector(nn.Module):
    """Linear maps input -> output -> ... -> output with activation and dropout between them.

    With `residual` the result is x + layers(x). The reference's `mlp2-relu-dropout0-residual` is num_layers 3.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        num_layers: int = 1,
        activation: Activation = "relu",
        dropout: float = 0.0,
        residual: bool = False,
        layer: Callable[[int, int], nn.Module] = nn.Linear,
    ):
        """Raises ValueError for an impossible shape, activation or dropout; `layer` makes a map from two sizes."""
        super().__init__()
        check_positive("input_size", input_size)
        check_positive("output_size", output_size)
        check_positive("num_layers", num_layers)
        check_choice("activation", activation, get_args(Activation))
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; it must be at least 0 and below 1.")
        if residual and input_size != output_size:
            raise ValueError(
                f"residual adds the input ({input_size} wide) to the output ({output_size} wide), "
                "which must be equal: leave dim unset or set residual to false."
            )
        sizes = [input_size] + [output_size] * num_layers
        self.layers = nn.ModuleList(layer(i, o) for i, o in pairwise(sizes))
        self.activation = activation
        self.dropout = nn.Dropout(dropout)
        self.residual = residual

    def forward(self, x: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch d"]:
        """Any float dtype in, the parameters' dtype out."""
        return self._mapped(x)

    def _mapped(self, x: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).dtype)
        y = self.layers[0](x)
        for layer in self.layers[1:]:
            y = layer(self.dropout(_ACTIVATIONS[self.activation](y)))
        return x + y if self.residual else y


def has_inert_dropout(head: nn.Module) -> bool:
    """Return whether a head has a projector with dropout and without an activation that it would follow."""
    projectors = (part for part in head.modules() if isinstance(part, Projector))
    return any(part.dropout.p > 0 and len(part.layers) == 1 for part in projectors)


class StackedProjector(Projector):
    """K independent Projectors of one input, each layer's parameters in one tensor."""

    def __init__(self, num_stacks: int, input_size: int, output_size: int, **options: Any):
        """Raises ValueError as a Projector does, whose options these are."""
        check_positive("num_stacks", num_stacks)
        super().__init__(
            input_size, output_size, layer=partial(StackedLinear, num_stacks), **options
        )

    def forward(self, x: Float[Tensor, "*batch H"]) -> Float[Tensor, "*batch K d"]:
        """Any float dtype in, the parameters' dtype out."""
        return self._mapped(x.reshape(-1, x.shape[-1])).transpose(0, 1).unflatten(0, x.shape[:-1])


class StackedLinear(nn.Module):
    """K linear maps: weight [K, out, in], bias [K, out], each starting as a torch.nn.Linear."""

    def __init__(self, num_stacks: int, input_size: int, output_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_stacks, output_size, input_size))
        self.bias = nn.Parameter(torch.empty(num_stacks, output_size))
        # nn.Linear's U(-1/sqrt(in), 1/sqrt(in)); torch's own initialisers would take K for a fan.
        bound = 1 / math.sqrt(input_size)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Float[Tensor, "*stacks n i"]) -> Float[Tensor, "K n o"]:
        """x is [n, in], shared by all K maps (one GEMM reads it once), or [K, n, in], one per map."""
        if x.dim() == 2:
            wide = nn.functional.linear(x, self.weight.flatten(0, 1), self.bias.flatten())
            return wide.unflatten(-1, self.bias.shape).transpose(0, 1)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))
