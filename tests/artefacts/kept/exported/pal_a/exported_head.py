"""The head of this exported model."""

from torch import nn

from .base import Features, UserState
from .pal_a import PalA as _Head


def build_head(name: str, hidden_size: int, init: dict) -> nn.Module:
    """The head with its constructor's arguments; `name` is what the config calls it."""
    return _Head(hidden_size, **init)


__all__ = ["Features", "UserState", "build_head"]
