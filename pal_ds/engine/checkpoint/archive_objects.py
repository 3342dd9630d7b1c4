"""Stand-ins for the objects and functions that a shard names: nothing that keeps or copies what it is given."""

import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

MOST_ARGUMENTS = 64
"""Arguments that an object of a shard may have; each call copies them."""


class Inert:
    """Stands for an object of DeepSpeed: takes a few arguments and any state, and drops them."""

    __slots__ = ()

    def __init__(self, *arguments: object) -> None:
        """Raises UnpicklingError for more arguments than any such object has."""
        if len(arguments) > MOST_ARGUMENTS:
            raise pickle.UnpicklingError(f"an object of {len(arguments)} parts")

    def __setstate__(self, state: object) -> None:
        """State is dropped."""

    def __hash__(self) -> int:
        return id(self)


class Mapping(OrderedDict[Any, Any]):
    """Stands for OrderedDict: `torch.save` makes it empty, fills it, and gives it a state, which is dropped."""

    def __setstate__(self, state: object) -> None:
        """State is dropped: kept, it would be copied for each mapping that names it."""

    def __reduce__(self) -> tuple[object, ...]:
        """Written again (by `reshard`), it is the OrderedDict that it stands for."""
        return OrderedDict, (), None, None, iter(self.items())


class Builder:
    """A function of ours that a pickle may call; unlike a bare one it takes no attributes from there."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self.call = call

    def __call__(self, *arguments: object) -> object:
        return self.call(*arguments)

    def __setstate__(self, state: object) -> None:
        """Raises UnpicklingError: it is shared by all shards that are read."""
        raise pickle.UnpicklingError("state for a function")
