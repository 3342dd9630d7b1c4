"""Classes of one's own, named in a recipe by their import path: where they are found, and the copy that a run keeps.

A class is looked for as Python looks (installed packages, `PYTHONPATH`), then in the current directory, then beside the
recipe, last in RUN/code, where a training leaves a copy of its file and of the files beside it that it imports. So a
run is evaluated, exported and resumed where the file itself is not at hand, and one that was edited since is noticed.
"""

import ast
import importlib
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

from pal_ds.errors import UserError, writing
from pal_ds.io.sealed import hash_of

CODE = "code"
"""The folder of a run that holds the copy."""


_added: list[str] = []
"""Folders that `make_importable` was given, in order."""


def where_looked() -> str:
    """Say, for a module that was not found, where it was looked for."""
    places = ", ".join(_added or [str(Path.cwd())])
    return (
        f"It was looked for among installed packages, in PYTHONPATH and in {places}. A class goes by module.Class, the "
        "module lying in one of these folders."
    )


def make_importable(folders: Iterable[Path]) -> None:
    """Lets modules be imported from these folders for the rest of the process, after all that Python finds itself."""
    for folder in folders:
        place = str(folder.resolve())
        if place not in _added:
            _added.append(place)
        if place not in sys.path:
            # At the end: a file beside a recipe never stands in for an installed package.
            sys.path.append(place)
            importlib.invalidate_caches()


def _class_paths(value: object, name: str) -> Iterator[str]:
    if isinstance(value, str) and name == "head":
        yield value
    elif isinstance(value, dict):
        if isinstance(value.get("class_path"), str):
            yield value["class_path"]
        for key, part in value.items():
            yield from _class_paths(part, str(key))


def source_files(module: str) -> dict[str, Path]:
    """The file of an importable module and, transitively, those below the same folder that it imports.

    Keyed by their path from that folder, as in `my_head.py` or `mine/heads/first.py`. pal_ds's own are left out.
    """
    top = module.partition(".")[0]
    file = getattr(importlib.import_module(top), "__file__", None)
    if file is None:
        return {}
    root = Path(file).parent.parent if Path(file).name == "__init__.py" else Path(file).parent
    files: dict[str, Path] = {}
    todo = [module]
    while todo:
        name = todo.pop()
        found = None if name.partition(".")[0] == "pal_ds" else _file_below(root, name)
        if found is None or str(found.relative_to(root)) in files:
            continue
        files[str(found.relative_to(root))] = found
        todo += [name.rpartition(".")[0]] if "." in name else []
        todo += _imported(found, name)
    return files


def _file_below(root: Path, module: str) -> Path | None:
    place = root.joinpath(*module.split("."))
    for file in (place.with_suffix(".py"), place / "__init__.py"):
        if file.is_file():
            return file
    return None


def _imported(file: Path, module: str) -> list[str]:
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    names = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            names += [base, *(f"{base}.{alias.name}".lstrip(".") for alias in node.names)]
    return names


def _is_installed(file: Path) -> bool:
    """Return True where a file lies where pip or Python put it: such code is found again without a copy."""
    places = (sysconfig.get_path(name) for name in ("purelib", "platlib", "stdlib"))
    return any(file.resolve().is_relative_to(Path(place).resolve()) for place in places)


def _own_files(recipe: str) -> Iterator[tuple[str, str, Path]]:
    """(top-level key of a recipe (YAML text), name in the copy, file) of all code of one's own."""
    tree = yaml.safe_load(recipe)
    for key, value in tree.items() if isinstance(tree, dict) else ():
        modules = {path.rpartition(".")[0]: None for path in _class_paths(value, key)}
        for module in modules:
            if module and module.partition(".")[0] != "pal_ds":
                files = source_files(module).items()
                yield from ((key, name, file) for name, file in files if not _is_installed(file))


def own_code_hashes(recipe: str) -> dict[str, str]:
    """Return the hash of each file of code of one's own that a recipe (YAML text) names, sources included."""
    return {name: hash_of(file) for _, name, file in _own_files(recipe)}


def keep_code(recipe: str, run: Path) -> None:
    """Copies the code of a recipe's own classes to RUN/code. Raises StorageError where that cannot be written."""
    for _, name, file in _own_files(recipe):
        target = run / CODE / name
        text = file.read_bytes()
        if not target.is_file() or target.read_bytes() != text:
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(text)


def refuse_changed_code(recipe: str, run: Path, allowed: Iterable[str] = ()) -> None:
    """Raises UserError where code of one's own is not what a run was trained with, but for the keys in `allowed`.

    Sources are passed over: what a run knows of them is the hash of the data that they gave.
    """
    for key, name, file in _own_files(recipe):
        kept = run / CODE / name
        if key in ("data", *allowed) or not kept.is_file():
            continue
        if kept.read_bytes() != file.read_bytes():
            raise UserError(
                f"{file}: not what this run was trained with, {run / CODE / file.name}. Restore the file, train in "
                f"another --run_dir, or resume with --allow_change {key} if the change alters no result. Where another "
                "file of that name was imported first, start a new process in another directory."
            )
