"""Recipes from Python: dicts, dataclasses and classes become the YAML that a recipe file would hold."""

import functools
import inspect
import json
import os
import sys
import tempfile
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from pal_ds.config.own_code import make_importable
from pal_ds.config.parser import explained
from pal_ds.config.recipe import as_recipe, dump_recipe, recipe_parser
from pal_ds.config.run_config import RunConfig
from pal_ds.data.sources.base import Source
from pal_ds.errors import UserError
from pal_ds.losses import MarginLoss

SHIPPED = Path(__file__).parents[1] / "recipes"
Recipe = str | os.PathLike[str] | Mapping[str, Any] | RunConfig | Sequence[Any]
"""A YAML file, the name of a shipped recipe, a dict of the same keys, a RunConfig, or several of them in layers."""


def read(
    recipe: Recipe, overrides: Mapping[str, Any], *, require_head: bool = True
) -> tuple[RunConfig, str]:
    """The recipe with dotted `overrides`, and its resolved YAML.

    Raises:
        UserError: no such file or recipe, a key or value that no recipe has, or a class that no import path names.
    """
    layers = recipe if isinstance(recipe, list | tuple) else [recipe]
    with tempfile.TemporaryDirectory(prefix="pal_ds_") as folder:
        files = [_file(layer, Path(folder, f"layer_{n}.yaml")) for n, layer in enumerate(layers)]
        make_importable([Path.cwd(), *(f.parent for f in files if f.parent != Path(folder))])
        words = [f"--config={file}" for file in files]
        for key, value in overrides.items():
            value = plain(value, key)
            words.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
        parser = recipe_parser(require_head=require_head)
        try:
            options = parser.parse_args(words)
            return as_recipe(parser.instantiate(options)), dump_recipe(options)
        except ArgumentError as error:
            raise UserError(explained(str(error), parser)) from None


def _file(layer: Any, place: Path) -> Path:
    """The file of one layer, written to `place` where it is none yet."""
    if isinstance(layer, str | os.PathLike):
        path = Path(layer)
        shipped = SHIPPED / f"{path}.yaml"
        if path.is_file():
            return path
        if path.name == str(path) and shipped.is_file():
            return shipped
        names = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.yaml")))
        raise UserError(f"{path}: no such file (looked from {Path.cwd()}). Shipped are {names}.")
    content = plain(layer, "recipe")
    if not isinstance(content, dict):
        raise UserError(f"recipe: a {type(layer).__name__}; give a file, a dict or a RunConfig.")
    place.write_text(yaml.safe_dump(content, sort_keys=False))
    return place


def plain(value: Any, key: str) -> Any:
    """What a recipe file would hold for a value of Python; `key` is where it stands.

    Raises:
        UserError: a class or an object that cannot be written down.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(name): plain(part, f"{key}.{name}") for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part, key) for part in value]
    if isinstance(value, type):
        return _import_path(value, key)
    if isinstance(value, functools.partial):
        if value.args:
            raise UserError(f"{key}: give the arguments of {value.func.__name__} by name.")
        return _spec(value.func, value.keywords, key)
    if isinstance(value, Source | MarginLoss):
        return _spec(type(value), _arguments(value, key), key)
    if is_dataclass(value):
        # `kind` of a loss with a shape of its own is set by the shape.
        parts = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        if parts.get("shape") is not None:
            parts.pop("kind", None)
        return plain(parts, key)
    raise UserError(
        f"{key}: a {type(value).__name__} cannot be written into a recipe. Give numbers, strings, lists, dicts, a "
        "config dataclass, or a class (functools.partial of one, with arguments)."
    )


def _spec(cls: Any, arguments: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {"class_path": _import_path(cls, key), "init_args": plain(arguments, key)}


def _arguments(value: Any, key: str) -> dict[str, Any]:
    """What an object was made with, where its class keeps each argument under its name."""
    arguments = {}
    for name in list(inspect.signature(type(value).__init__).parameters)[1:]:
        if not hasattr(value, name):
            raise UserError(
                f"{key}: {type(value).__name__} does not keep its argument {name!r}. Give functools.partial("
                f"{type(value).__name__}, {name}=...) in place of the object."
            )
        arguments[name] = getattr(value, name)
    return arguments


def _import_path(cls: type, key: str) -> str:
    """`module.Class`. Raises UserError for a class that another process could not import."""
    if cls.__module__ == "__main__" or "<locals>" in cls.__qualname__:
        raise UserError(
            f"{key}: {cls.__qualname__} is defined in this script, notebook or function, where no other process finds "
            "it. Put it into a file beside the recipe or in the current directory, my_head.py say, and import it."
        )
    if cls.__module__.partition(".")[0] != "pal_ds":
        return f"{cls.__module__}.{cls.__qualname__}"
    # As a recipe that names it shortly is resolved: two names of one class would read as a change on resume.
    parts = cls.__module__.split(".")
    packages = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    held = [name for name in packages if getattr(sys.modules[name], cls.__name__, None) is cls]
    return f"{held[0]}.{cls.__name__}"
