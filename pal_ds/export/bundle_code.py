"""The Python files of an exported folder: flat beside each other, as transformers wants them."""

import ast
import inspect
from pathlib import Path

import pal_ds.heads
import pal_ds.remote_code
from pal_ds.export.own_head import write_own_code
from pal_ds.heads.base import Head

_HEADS = Path(pal_ds.heads.__file__).parent
_EXPORTED = Path(pal_ds.remote_code.__file__).parent

_HEAD_FILE = '''"""The head of this exported model."""

from torch import nn

from .base import Features, UserState
from .{module} import {name} as _Head


def build_head(name: str, hidden_size: int, init: dict) -> nn.Module:
    """The head with its constructor's arguments; `name` is what the config calls it."""
    return _Head(hidden_size, **init)


__all__ = ["Features", "UserState", "build_head"]
'''

_STOCK_FILE = '''"""{stock}, scoring every text in the form that the trainer scored."""

from transformers import {stock}

from .canonical_rows import CanonicalRows


class {name}(CanonicalRows, {stock}):
    """Ids of any tokenizer call in, the trainer's score out; weights are those of {stock}."""


__all__ = ["{name}"]
'''


def write_pal_code(folder: Path, head: Head) -> None:
    """Write modeling_pal.py, the head's file, and all they import."""
    source = Path(inspect.getfile(type(head)))
    module = source.stem
    _copy(folder, [_EXPORTED / "modeling_pal.py"], skip={"exported_head"})
    if type(head).__module__.partition(".")[0] == "pal_ds":
        _copy(folder, [source, source.with_name("base.py")])
    else:
        module, needed = write_own_code(folder, type(head))
        _copy(folder, [_HEADS / f"{name}.py" for name in sorted({"base", *needed})])
    text = _HEAD_FILE.format(module=module, name=type(head).__name__)
    (folder / "exported_head.py").write_text(text)


def write_stock_code(folder: Path, stock: str) -> str:
    """Write modeling_canonical.py, a subclass of a stock class; return the class's name."""
    name = f"Canonical{stock}"
    _copy(folder, [_EXPORTED / "canonical_rows.py"])
    text = _STOCK_FILE.format(stock=stock, name=name)
    (folder / "modeling_canonical.py").write_text(text)
    return name


def _copy(folder: Path, files: list[Path], skip: frozenset[str] | set[str] = frozenset()) -> None:
    """Copy files and, transitively, the siblings that they import relatively."""
    seen: set[Path] = set()
    while files:
        file = files.pop()
        if file in seen:
            continue
        seen.add(file)
        text = file.read_text(encoding="utf-8")
        (folder / file.name).write_text(text, encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module not in skip:
                files.append(file.with_name(f"{node.module}.py"))
