"""jaxtyping's names where it is installed, plain stand-ins where it is not (exported folders need torch alone)."""

from typing import TYPE_CHECKING

try:
    from jaxtyping import Bool, Float, Int
except ImportError:

    class _AnyShape:
        def __getitem__(self, item: tuple[type, str]) -> type:
            return item[0]

    if not TYPE_CHECKING:
        Bool = Float = Int = _AnyShape()

__all__ = ["Bool", "Float", "Int"]
