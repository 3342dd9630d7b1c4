"""The Python files of an exported folder: flat beside each other, as transformers wants them."""

import ast
import importlib
import inspect
from pathlib import Path

import pal_ds.heads
import pal_ds.remote_code
from pal_ds.config.own_code import source_files
from pal_ds.errors import UserError
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


PREFIX = "own_"
"""Before the name of each such file, so that none takes the name of one of ours."""


def write_own_code(folder: Path, head: type[Head]) -> tuple[str, set[str]]:
    """Writes the head's file and those of its neighbours that it imports.

    Returns:
        The name of the head's file without its ending, and the modules of pal_ds.heads that these files import.

    Raises:
        UserError: a file imports something of pal_ds that an exported folder does not hold, or as a whole module, or
            two files would go by one name.
    """
    files = source_files(head.__module__)
    own = {_module(name): file for name, file in files.items() if not name.endswith("__init__.py")}
    flat = {module: PREFIX + module.rpartition(".")[2] for module in own}
    if len(set(flat.values())) < len(flat):
        raise UserError(f"{', '.join(map(str, own.values()))}: two files of one name. Rename one.")
    needed: set[str] = set()
    for module, file in own.items():
        text = _Rewriter(file, module, flat, needed).rewritten()
        (folder / f"{flat[module]}.py").write_text(text, encoding="utf-8")
    return flat[head.__module__], needed


def _module(name: str) -> str:
    return ".".join(Path(name).with_suffix("").parts)


class _Rewriter:
    """One file whose imports of pal_ds and of its neighbours become relative ones."""

    def __init__(self, file: Path, module: str, flat: dict[str, str], needed: set[str]) -> None:
        self.file, self.module, self.flat, self.needed = file, module, flat, needed
        self.text = file.read_text(encoding="utf-8")

    def rewritten(self) -> str:
        """The file's text; what it imports of pal_ds is noted in `needed`."""
        lines = self.text.splitlines()
        nodes = [
            n for n in ast.walk(ast.parse(self.text)) if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        for node in sorted(nodes, key=lambda node: -node.lineno):
            statements = self._relative(node)
            if statements is not None:
                indent = " " * node.col_offset
                end = node.end_lineno or node.lineno
                lines[node.lineno - 1 : end] = [indent + line for line in statements]
        return "\n".join(lines) + "\n"

    def _relative(self, node: ast.Import | ast.ImportFrom) -> list[str] | None:
        """The statements in place of one; None where it may stay."""
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in self.flat or alias.name.partition(".")[0] == "pal_ds":
                    self._refuse(node, f"Write `from {alias.name} import NAME`")
            return None
        base = self._base(node)
        if base in self.flat:
            return [_relative_import(self.flat[base], node.names)]
        if base.partition(".")[0] == "pal_ds":
            return [self._of_ours(node, base, alias) for alias in node.names]
        if node.level:
            return [self._of_package(node, base, alias) for alias in node.names]
        return None

    def _base(self, node: ast.ImportFrom) -> str:
        package = self.module.split(".")[:-1]
        above = package[: len(package) - node.level + 1] if node.level else []
        return ".".join([*above, *filter(None, [node.module])])

    def _of_ours(self, node: ast.ImportFrom, base: str, alias: ast.alias) -> str:
        place = base
        if base in ("pal_ds", "pal_ds.heads"):
            value = getattr(importlib.import_module(base), alias.name, None)
            place = getattr(value, "__module__", "")
        heads, _, name = place.rpartition(".")
        if heads != "pal_ds.heads":
            rule = "An exported head may import pal_ds.heads alone, or `from pal_ds import Head`"
            self._refuse(node, rule)
        self.needed.add(name)
        return _relative_import(name, [alias])

    def _of_package(self, node: ast.ImportFrom, base: str, alias: ast.alias) -> str:
        module = f"{base}.{alias.name}".lstrip(".")
        if module in self.flat:
            self._refuse(node, f"Write `from {module} import NAME`")
        return _relative_import(self.flat.get(base, base), [alias])

    def _refuse(self, node: ast.stmt, remedy: str) -> None:
        line = self.text.splitlines()[node.lineno - 1].strip()
        raise UserError(
            f"{self.file}:{node.lineno}: `{line}`: an exported folder holds the head's code without pal_ds around it. "
            f"{remedy}."
        )


def _relative_import(module: str, names: list[ast.alias]) -> str:
    return ast.unparse(ast.ImportFrom(module, names, level=1))
