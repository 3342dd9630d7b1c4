"""Docstrings name axes as [step][rank], which Markdown would take for a link: escape the brackets between."""

import re
from typing import Any

import griffe

_AXES = re.compile(r"\[([\w-]+)\]\[([\w-]+)\]")


class Axes(griffe.Extension):
    """Escapes axes in the docstrings of a package, outside of code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            parts = obj.docstring.value.split("`")
            parts[::2] = [_AXES.sub(r"[\1]\\[\2]", part) for part in parts[::2]]
            obj.docstring.value = "`".join(parts)
