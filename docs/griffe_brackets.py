"""What Markdown would take for links in docstrings: axes as [step][rank], options in brackets, lists in examples."""

import re
from typing import Any

import griffe

_AXES = re.compile(r"\](\s?)\[")
_EXAMPLE = re.compile(r"^>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)
"""A doctest and what it prints, up to an empty line."""


class Brackets(griffe.Extension):
    """Escapes a bracket that opens where one closed, outside of code; doctests become code blocks."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one module, class, function or attribute."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub(lambda match: f"```pycon\n{match[0]}\n```", obj.docstring.value)
            parts = text.split("`")
            parts[::2] = [_AXES.sub(r"]\1\[", part) for part in parts[::2]]
            obj.docstring.value = "`".join(parts)
