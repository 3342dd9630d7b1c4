"""The one Python file of an exported folder: a modelling class with its head, and all that they import."""

import ast
import importlib
import inspect
from pathlib import Path

import transformers

import pal_ds.heads
import pal_ds.remote_code
from pal_ds.config.own_code import source_files
from pal_ds.errors import UserError, without_stop
from pal_ds.export.flatten import Import, Source, flatten
from pal_ds.heads.base import Head

_HEADS = Path(pal_ds.heads.__file__).parent
_EXPORTED = Path(pal_ds.remote_code.__file__).parent

_HEAD_TEXT = '''"""The head of this exported model."""

from torch import nn

from .base import Features, UserState
from .head import {name} as _Head


def build_head(name: str, hidden_size: int, init: dict) -> nn.Module:
    """The head with its constructor's arguments; `name` is what the config calls it."""
    return _Head(hidden_size, **init)
'''

_STOCK_TEXT = '''"""{stock}, scoring every text in the form that the trainer scored."""

import transformers

from .canonical_rows import CanonicalRows


try:
    from transformers import {stock}
except ImportError as error:
    raise ImportError(
        f"transformers {{transformers.__version__}} has no {stock}: install {version}, with which this "
        "model was exported, or a newer one."
    ) from error


class {name}(CanonicalRows, {stock}):
    """Ids of any tokenizer call in, the trainer's score out; weights are those of {stock}."""


__all__ = ["{name}"]
'''


def write_pal_code(folder: Path, head: Head) -> None:
    """Write modeling_pal.py: the modelling class, this head and all they import.

    Raises:
        UserError: a head of one's own imports something of pal_ds that an exported folder does not hold, or as a whole
            module, or its names cannot be told from others.
    """
    cls = type(head)
    own = cls.__module__.partition(".")[0] != "pal_ds"
    source = own_source(cls) if own else _ours(Path(inspect.getfile(cls)))
    text = _HEAD_TEXT.format(name=cls.__name__)
    places = {"base": _ours(_HEADS / "base.py"), "head": source}
    stand_in = Source("head of this model", text, lambda node, _: _sibling(node, places))
    _write(folder / "modeling_pal.py", _ours(_EXPORTED / "modeling_pal.py", stand_in))


def write_stock_code(folder: Path, stock: str) -> str:
    """Write modeling_canonical.py, a subclass of a stock class; return the class's name."""
    name = f"Canonical{stock}"
    rows = {"canonical_rows": _ours(_EXPORTED / "canonical_rows.py")}
    text = _STOCK_TEXT.format(stock=stock, name=name, version=transformers.__version__)
    _write(
        folder / "modeling_canonical.py", Source(name, text, lambda node, _: _sibling(node, rows))
    )
    return name


def _write(file: Path, source: Source) -> None:
    file.write_text(flatten(source), encoding="utf-8")


def _sibling(node: Import, places: dict[str, Source]) -> Source | None:
    if isinstance(node, ast.ImportFrom) and node.level:
        return places[node.module or ""]
    return None


def _ours(file: Path, stand_in: Source | None = None) -> Source:
    """A file of pal_ds, with `stand_in` for what it imports as `exported_head`."""

    def find(node: Import, _: ast.alias) -> Source | None:
        if not (isinstance(node, ast.ImportFrom) and node.level):
            return None
        if node.module == "exported_head":
            return stand_in
        return _ours(file.with_name(f"{node.module}.py"), stand_in)

    name = f"pal_ds/{file.parent.name}/{file.name}"
    return Source(name, file.read_text(encoding="utf-8"), find)


def own_source(head: type[Head]) -> Source:
    """The module of a head of one's own, whose imports lead to its neighbours and to pal_ds.heads."""
    return _Own(source_files(head.__module__)).source(head.__module__)


class _Own:
    """The files of one's own that a head imports."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = {_module(name): (name, file) for name, file in files.items()}

    def source(self, module: str) -> Source:
        name, file = self.files[module]
        package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
        text = file.read_text(encoding="utf-8")

        def find(node: Import, alias: ast.alias) -> Source | None:
            try:
                return self._origin(node, alias, package)
            except UserError as error:
                line = text.splitlines()[node.lineno - 1].strip()
                raise UserError(
                    f"{file}:{node.lineno}: `{line}`: an exported folder holds the head's code without pal_ds around "
                    f"it. {without_stop(error)}."
                ) from None

        return Source(name, text, find)

    def _origin(self, node: Import, alias: ast.alias, package: list[str]) -> Source | None:
        if isinstance(node, ast.Import):
            if alias.name in self.files or alias.name.partition(".")[0] == "pal_ds":
                raise UserError(f"Write `from {alias.name} import NAME`")
            return None
        above = package[: len(package) - node.level + 1] if node.level else []
        base = ".".join([*above, *filter(None, [node.module])])
        if base.partition(".")[0] == "pal_ds":
            return _of_heads(base, alias)
        submodule = f"{base}.{alias.name}".lstrip(".")
        above_it = importlib.import_module(base) if base else None
        if submodule in self.files and (
            above_it is None or inspect.ismodule(getattr(above_it, alias.name, None))
        ):
            raise UserError(f"Write `from {submodule} import NAME`")
        return self.source(base) if base in self.files else None


def _of_heads(base: str, alias: ast.alias) -> Source:
    """The file of pal_ds.heads that defines a name of pal_ds."""
    place = base
    if base in ("pal_ds", "pal_ds.heads"):
        value = getattr(importlib.import_module(base), alias.name, None)
        place = getattr(value, "__module__", "")
    heads, _, name = place.rpartition(".")
    if heads != "pal_ds.heads":
        raise UserError(
            "An exported head may import pal_ds.heads alone, or `from pal_ds import Head`"
        )
    return _ours(_HEADS / f"{name}.py")


def _module(name: str) -> str:
    return ".".join(Path(name.removesuffix("/__init__.py").removesuffix(".py")).parts)
