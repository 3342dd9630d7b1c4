"""The head of an exported model by name. An export replaces this file by one that names its head."""

from torch import nn

from pal_ds.heads import HEADS, Features, Head, UserState


def build_head(name: str, hidden_size: int, init: dict) -> nn.Module:
    """The head `name` with its constructor's arguments; ValueError for an unknown one.

    A head of one's own goes by its import path, and is built where its module was imported before: a name in a folder
    imports nothing.
    """
    known = {**HEADS, **{f"{h.__module__}.{h.__name__}": h for h in _heads_in_memory(Head)}}
    if name in known:
        return known[name](hidden_size, **init)
    if "." in name:
        raise ValueError(
            f"head {name!r} is a class of its own. Import {name.rpartition('.')[0]} first, or allow the folder's code "
            "with trust_remote_code=True (`--trust_remote_code` on the command line)."
        )
    raise ValueError(f"head {name!r} is unknown; this version has {', '.join(HEADS)}.")


def _heads_in_memory(base: type[Head]) -> list[type[Head]]:
    """Every subclass of a head that some module has defined so far."""
    return [head for own in base.__subclasses__() for head in (own, *_heads_in_memory(own))]


__all__ = ["Features", "UserState", "build_head"]
