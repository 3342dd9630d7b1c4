"""Checks of constructor arguments that say what was wrong, the rule and the remedy."""

from collections.abc import Iterable


def check_choice(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    choices = tuple(allowed)
    if value not in choices:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(choices)}.")


def check_positive(name: str, value: int | float) -> None:
    """Raise ValueError unless `value` is above zero (and not NaN)."""
    if not value > 0:
        raise ValueError(f"{name} is {value}; it must be above 0.")


def check_not_negative(name: str, value: int | float) -> None:
    """Raise ValueError unless `value` is zero or above (and not NaN)."""
    if not value >= 0:
        raise ValueError(f"{name} is {value}; it must be 0 or more.")
