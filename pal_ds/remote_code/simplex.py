"""Checks of the point that stands for a user; stdlib only, carried by exported folders."""

import math
from collections.abc import Sequence

TOLERANCE = 1e-4


def check_point(
    point: Sequence[float] | None, sizes: Sequence[int], on_simplex: bool
) -> list[float]:
    """The point as floats; ValueError unless it is a mixture of K, the first of `sizes`.

    Off the simplex it must be finite numbers, as many as one of `sizes`.
    """
    if on_simplex:
        return check_mixture(point, sizes[0])
    numbers = [] if point is None else [float(number) for number in point]
    if len(numbers) not in sizes or not all(map(math.isfinite, numbers)):
        wanted = " or ".join(map(str, sizes))
        raise ValueError(
            f"mixture has {len(numbers)} numbers, which must all be finite; this head's users are points of {wanted}."
        )
    return numbers


def check_mixture(mixture: Sequence[float] | None, num_prototypes: int) -> list[float]:
    """The mixture as floats; ValueError unless it has K entries, each >= 0, that sum to 1."""
    if mixture is None:
        raise ValueError(f"mixture is missing; it must be {num_prototypes} weights that sum to 1.")
    weights = [float(weight) for weight in mixture]
    if len(weights) != num_prototypes:
        raise ValueError(
            f"mixture has {len(weights)} entries, the head has {num_prototypes} prototypes; give "
            f"{num_prototypes} weights that sum to 1."
        )
    if not all(weight >= 0 for weight in weights):
        raise ValueError(f"mixture {weights} has an entry below 0 (or not a number).")
    if abs(sum(weights) - 1) > TOLERANCE:
        raise ValueError(
            f"mixture sums to {sum(weights):g}; its entries must sum to 1 within {TOLERANCE:g}."
        )
    return weights
