"""Random comparisons for the kernels, and the rule by which their errors are judged."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pal_ds.kernels.eager import PairLossOutput
from pal_ds.kernels.pair_loss import pair_loss
from pal_ds.losses import PairFacts


@dataclass
class Comparisons:
    """Inputs of the pair loss."""

    response: Tensor
    index: Tensor
    point: Tensor
    facts: PairFacts
    scale: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Comparisons":
        scale = None if self.scale is None else self.scale.to(dtype)
        response, point = self.response.to(dtype), self.point.to(dtype)
        return Comparisons(response, self.index, point, self.facts, scale)

    def compute(self, kind: str, weighting: str, implementation: str) -> dict[str, Tensor]:
        """Outputs and gradients by name."""
        response, point = (
            self.response.clone().requires_grad_(),
            self.point.clone().requires_grad_(),
        )
        scale = None if self.scale is None else self.scale.clone().requires_grad_()
        output: PairLossOutput = pair_loss(
            response=response,
            response_index=self.index,
            point=point,
            facts=self.facts,
            scale=scale,
            kind=kind,
            weighting=weighting,
            implementation=implementation,
        )
        output.total.backward()
        made = {**output._asdict(), "d_response": response.grad, "d_point": point.grad}
        if scale is not None:
            made["d_scale"] = scale.grad
        return {name: value.detach() for name, value in made.items()}


def comparisons(
    num_pairs: int,
    num_positions: int,
    dim: int,
    *,
    cosine: bool = False,
    points: int = 1,
    num_responses: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Comparisons:
    """Ragged windows, one of length 1, one empty and one full; half of the responses in several comparisons."""
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    if num_responses is None:
        index = torch.randperm(2 * num_pairs, generator=generator).view(num_pairs, 2)
        num_responses = 2 * num_pairs
    else:
        index = integers(num_responses, num_pairs, 2)
    start = integers(num_positions, num_pairs)
    end = start + 1 + integers(num_positions, num_pairs) % (num_positions - start)
    if num_pairs > 2:
        start[0], end[0] = num_positions - 1, num_positions
        start[1], end[1] = 0, num_positions
        start[2], end[2] = 0, 0
    facts = PairFacts(
        label=2 * integers(2, num_pairs) - 1,
        start=start,
        end=end,
        required_margin=torch.rand(num_pairs, generator=generator),
        weight=torch.rand(num_pairs, generator=generator),
    )
    # The last one stands in for an empty run.
    facts.weight[-1] = 0.0 if num_pairs > 3 else 1.0
    return Comparisons(
        torch.randn(num_responses, num_positions, dim, generator=generator).to(dtype),
        index,
        torch.randn(num_pairs, points, dim, generator=generator).to(dtype),
        facts,
        torch.tensor([3.0], dtype=dtype) if cosine else None,
    )


def check_errors(
    kernel: dict[str, Tensor], eager: dict[str, Tensor], oracle: dict[str, Tensor]
) -> None:
    """Against fp64: at most twice the error of eager torch in the same dtype, plus 1e-6, plus a unit in the last place.

    The latter as eager torch's error may happen to be near 0: rounding a reward is half a unit in its last place, and a
    margin and its loss have that of two.
    """
    of_rewards = {"margin", "loss", "total"} if "reward" in oracle else set()
    assert kernel.keys() == oracle.keys()
    for name, truth in oracle.items():
        assert kernel[name].shape == truth.shape and kernel[name].dtype == eager[name].dtype, name
        assert bool(kernel[name].isfinite().all()), name
        errors = [float((made[name].double() - truth).abs().max()) for made in (kernel, eager)]
        largest = float(oracle["reward" if name in of_rewards else name].abs().max())
        bound = 2 * errors[1] + 1e-6 + 2.0**-23 * largest
        assert errors[0] <= bound, f"{name}: {errors[0]:.2e}, eager {errors[1]:.2e}"


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
