"""The head of an exported model by name. An export replaces this file by one that names its head."""

from torch import nn

from pal_ds.heads import HEADS, Features, UserState


def build_head(name: str, hidden_size: int, init: dict) -> nn.Module:
    """The head `name` with its constructor's arguments; ValueError for an unknown one."""
    if name not in HEADS:
        raise ValueError(f"head {name!r} is unknown; this version has {', '.join(HEADS)}.")
    return HEADS[name](hidden_size, **init)


__all__ = ["Features", "UserState", "build_head"]
