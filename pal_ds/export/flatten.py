"""Several Python modules as one file: each behind those that it imports, and names that two of them use told apart.

transformers before 5 copies only the files that an exported folder's modelling code imports itself, not those that
these import in turn; a single file opens everywhere.
"""

import ast
import builtins
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from pal_ds.errors import UserError

Import = ast.Import | ast.ImportFrom


@dataclass(frozen=True)
class Source:
    """A module that goes into the file."""

    name: str
    """Tells it from the others, and is shown above its part."""
    text: str
    find: Callable[[Import, ast.alias], "Source | None"]
    """Function to the module that defines an imported name; None where that is no part of the file."""


def flatten(main: Source) -> str:
    """Return the text of one file that defines all of `main` and of what it imports.

    Raises:
        UserError: `import *`, a name that its module does not have, or one that cannot be told from another's.
    """
    file = _File()
    file.add(main)
    docstring = ast.get_docstring(ast.parse(main.text), clean=False)
    future = ["from __future__ import annotations\n"] if file.future else []
    imports = [
        f"{start} {', '.join(sorted(names))}" for start, names in sorted(file.imports.items())
    ]
    return "\n".join([f'"""{docstring}"""\n', *future, *imports, "\n", *file.parts])


class _File:
    def __init__(self) -> None:
        self.parts: list[str] = []
        self.imports: dict[str, set[str]] = {}
        """Names of other libraries, by the beginning of the statement that imports them."""
        self.future = False
        self.names: dict[str, dict[str, str]] = {}
        """For each module, its top-level names and what they are called in the file."""
        # A module may call its own as a builtin, which the others still mean.
        self.taken = dict.fromkeys(dir(builtins), "")
        self.main: str | None = None

    def add(self, source: Source) -> dict[str, str]:
        """Add a module behind all that it imports, once; return its names."""
        if source.name in self.names:
            return self.names[source.name]
        self.main = self.main or source.name
        names = self.names[source.name] = {}
        tree = ast.parse(source.text)
        gone = [
            node
            for node in ast.walk(tree)
            if isinstance(node, Import) and self._is_inner(source, node, names)
        ]
        meanings: dict[str, str] = {}
        for name, meaning in _defined(tree, gone):
            here = meaning or source.name
            meanings[name] = here if meanings.get(name, here) == here else source.name
        names |= {name: self._free(name, meaning) for name, meaning in meanings.items()}
        changed = {name: final for name, final in names.items() if name != final}
        if changed:
            _refuse_ambiguous(source, tree, changed, gone)
            tree = ast.fix_missing_locations(_Renamed(changed, gone).visit(tree))
            text = ast.unparse(tree)
            # The imports that went left `pass` behind.
            gone = []
            tree = ast.parse(text)
        else:
            text = source.text
        self.parts.append(self._part(source, text, tree, gone))
        return names

    def _is_inner(self, source: Source, node: Import, names: dict[str, str]) -> bool:
        """Follow an import of another module of the file, and note what its names are called."""
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            self.future = True
            return True
        inner = False
        for alias in node.names:
            origin = source.find(node, alias)
            if alias.name == "*":
                raise UserError(f"{source.name}:{node.lineno}: `import *`: write the names.")
            if origin is not None:
                inner = True
                known = self.add(origin)
                if alias.name not in known:
                    raise UserError(
                        f"{source.name}:{node.lineno}: {origin.name} has no {alias.name}, or imports this file."
                    )
                names[alias.asname or alias.name] = known[alias.name]
        return inner

    def _free(self, name: str, meaning: str) -> str:
        final, number = name, 1
        while self.taken.setdefault(final, meaning) != meaning:
            number += 1
            final = f"{name}_{number}"
        return final

    def _part(self, source: Source, text: str, tree: ast.Module, gone: list[Import]) -> str:
        """The module's text without docstring and without imports that stand at the top of the file."""
        lines = text.splitlines()
        title = source.name
        cut: list[ast.stmt] = list(gone)
        for node in tree.body:
            if isinstance(node, Import) and node not in gone:
                for alias in node.names:
                    # One name a line where a module is imported whole: transformers looks for these.
                    words = ast.unparse(_only(node, alias)).split(
                        " ", 3 if isinstance(node, ast.ImportFrom) else 1
                    )
                    self.imports.setdefault(" ".join(words[:-1]), set()).add(words[-1])
                cut.append(node)
            elif source.name != self.main and _assigns(node) == "__all__":
                cut.append(node)
        first = tree.body[0] if tree.body else None
        if isinstance(first, ast.Expr) and (docstring := ast.get_docstring(tree)):
            title += f": {docstring.splitlines()[0]}"
            cut.append(first)
        for node in sorted(cut, key=lambda node: -node.lineno):
            kept = [" " * node.col_offset + "pass"] if node.col_offset else []
            lines[node.lineno - 1 : node.end_lineno] = kept
        return f"# ---- {title}\n" + "\n".join(lines).strip("\n") + "\n\n"


def _only(node: Import, alias: ast.alias) -> Import:
    if isinstance(node, ast.Import):
        return ast.Import([alias])
    return ast.ImportFrom(node.module, [alias], node.level)


def _assigns(node: ast.stmt) -> str | None:
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return target.id if isinstance(target, ast.Name) else None


_SCOPES = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _top_level(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """The nodes outside of functions and classes, and these themselves."""
    for node in nodes:
        yield node
        if not isinstance(node, _SCOPES | ast.Lambda):
            yield from _top_level(ast.iter_child_nodes(node))


def _defined(tree: ast.Module, gone: list[Import]) -> Iterator[tuple[str, str | None]]:
    """(top-level name, the import statement that gives it, if one does)."""
    for node in _top_level(tree.body):
        if isinstance(node, _SCOPES):
            yield node.name, None
        elif (
            isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node.id != "__all__"
        ):
            yield node.id, None
        elif isinstance(node, Import) and node not in gone:
            for alias in node.names:
                whole = isinstance(node, ast.Import) and not alias.asname
                meaning = ast.unparse(_only(node, alias))
                yield (
                    (alias.name.partition(".")[0], "import")
                    if whole
                    else (alias.asname or alias.name, meaning)
                )


def _refuse_ambiguous(
    source: Source, tree: ast.Module, changed: dict[str, str], gone: list[Import]
) -> None:
    """Raise UserError where a name that must be another is also one of a function's own."""
    outer = set(map(id, _top_level(tree.body)))
    for node in ast.walk(tree):
        bound: list[str] = []
        if isinstance(node, ast.arg):
            bound = [node.arg]
        elif id(node) in outer or node in gone:
            continue
        elif isinstance(node, _SCOPES):
            bound = [node.name]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound = [node.id]
        elif isinstance(node, Import):
            bound = [alias.asname or alias.name for alias in node.names]
        if both := [name for name in bound if name in changed]:
            raise UserError(
                f"{source.name}:{getattr(node, 'lineno', 1)}: {both[0]} is a name of this module, too, and "
                "the export has another of that name. Call one of the two otherwise."
            )


class _Renamed(ast.NodeTransformer):
    """A module with some of its top-level names changed, and without some imports."""

    def __init__(self, changed: dict[str, str], gone: list[Import]) -> None:
        self.changed, self.gone = changed, gone

    def visit(self, node: ast.AST) -> ast.AST:
        """Change one node and those below it."""
        if node in self.gone:
            return ast.Pass()
        if isinstance(node, ast.Name):
            node.id = self.changed.get(node.id, node.id)
        elif isinstance(node, _SCOPES):
            node.name = self.changed.get(node.name, node.name)
        elif isinstance(node, ast.Global):
            node.names = [self.changed.get(name, name) for name in node.names]
        elif isinstance(node, Import):
            for alias in node.names:
                name = alias.asname or alias.name
                if name in self.changed:
                    alias.asname = self.changed[name]
        return self.generic_visit(node)
