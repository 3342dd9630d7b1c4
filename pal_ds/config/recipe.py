"""Recipes: read from files, arguments or Python, and written as YAML.

From Python, dicts, dataclasses and classes become the YAML that a recipe file would hold.
"""

import functools
import inspect
import json
import os
import sys
import tempfile
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from pal_ds.config.consent import REMEDY, REMOTE_CODE, Consent, import_paths
from pal_ds.config.own_code import CODE, keep_code, make_importable, refuse_changed_code
from pal_ds.config.parser import explained, objects_of, parsed
from pal_ds.config.run_config import RunConfig
from pal_ds.data.sources.base import Source
from pal_ds.errors import UserError
from pal_ds.heads.base import Head
from pal_ds.io.yaml_files import flattened, read_yaml
from pal_ds.losses import MarginLoss
from pal_ds.runs.run_dir import RunDirectory

_LONGEST_PATH, _LONGEST_WORD = 4096, 200
SHIPPED = Path(__file__).parents[1] / "recipes"
Recipe = str | os.PathLike[str] | Mapping[str, Any] | RunConfig | Sequence[Any]
"""A YAML file, the name of a shipped recipe, a dict of the same keys, a RunConfig, or several of them in layers."""

# What a key of any type holds is data: jsonargparse would make an object of a class that is named in it.
set_parsing_settings(
    instantiate_subclass_spec_in_any=False, docstring_parse_attribute_docstrings=True
)


TRUST_CODE: dict[str, Any] = {
    "action": "store_true",
    "help": "import classes that recipes or runs name beyond pal_ds's, and run code they ask for",
}


def add_recipe_arguments(parser: ArgumentParser, *, require_head: bool = True) -> None:
    """Add --config, --trust_code and every key of a recipe to a parser."""
    import pal_ds.data.sources
    import pal_ds.heads  # noqa: F401  short class names resolve once their modules are imported

    parser.add_argument(
        "--config", action="config", help="YAML recipe; repeat to layer, later wins"
    )
    parser.add_argument("--trust_code", **TRUST_CODE)
    parser.add_class_arguments(RunConfig, nested_key=None, skip=set() if require_head else {"head"})
    if not require_head:
        optional = "the method, as in a recipe; this command can do without it"
        parser.add_argument(
            "--head", type=Callable[[int], Head] | None, default=None, help=optional
        )


def as_recipe(options: Namespace) -> RunConfig:
    """Return the recipe among the instantiated options of a command."""
    return RunConfig(**{name: options[name] for name in RunConfig.__dataclass_fields__})


def recipe_parser(*, require_head: bool = True) -> ArgumentParser:
    """Return a parser of recipes alone; it raises ArgumentError for what no recipe has."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_recipe_arguments(parser, require_head=require_head)
    return parser


def dump_recipe(options: Namespace, parser: ArgumentParser | None = None) -> str:
    """Return the resolved recipe as YAML; `--config` on it gives the same run again.

    `parser` is that of `recipe_parser`, for whoever has made one already: making it takes most of a second.
    """
    chosen = Namespace(**{name: options[name] for name in RunConfig.__dataclass_fields__})
    return (parser or recipe_parser()).dump(chosen, skip_validation=True)


def read_recipe(arguments: list[str]) -> tuple[RunConfig, str]:
    """Return the recipe that command-line arguments (--config and dotted keys) describe, and its YAML.

    Raises:
        UserError: a key or value that no recipe has, or code that a file asks for without `--trust_code`.
    """
    files = [Path(word.partition("=")[2]) for word in arguments if word.startswith("--config=")]
    # A layer may be YAML text, and a file that is missing is named by the parser.
    files = [file for file in files if len(str(file)) < _LONGEST_PATH and file.is_file()]
    for file in files:
        read_yaml(file)
    consent, parser = Consent.of_words(arguments), recipe_parser()
    try:
        with consent.given(files):
            return _parsed(parser, arguments, consent, "recipe")
    except ArgumentError as error:
        words = " ".join(
            w if len(w) < _LONGEST_WORD else f"{w[:_LONGEST_WORD]} ..." for w in arguments
        )
        raise UserError(f"{words}: {explained(str(error), parser)}") from None


def _parsed(
    parser: ArgumentParser, arguments: list[str], consent: Consent, where: str
) -> tuple[RunConfig, str]:
    options = parsed(parser, arguments, where)
    return made(parser, options, consent), dump_recipe(options)


def made(parser: ArgumentParser, options: Namespace, consent: Consent) -> RunConfig:
    """Make the recipe of parsed options, once what it names was found to be allowed. Raises UserError where not."""
    consent.check(options)
    return as_recipe(objects_of(parser, options))


def recipe_from_arguments(arguments: list[str]) -> RunConfig:
    """Return the recipe that command-line arguments describe. Raises UserError as `read_recipe` does."""
    return read_recipe(arguments)[0]


def load_recipe(path: Path, *, trust_code: bool = False) -> RunConfig:
    """Read the recipe of a run's config.yaml, without the source of its data, which the run has read already.

    With `trust_code`, classes of one's own are imported, at last from the copy that the run keeps; without it a run
    has pal_ds's own alone, and no code of its backbone's or tokenizer's folder.

    Raises:
        UserError: a key or value that no recipe has, code that is not allowed, or code at hand that is not what the
            run was trained with.
    """
    try:
        tree = read_yaml(path)
    except UserError as error:
        raise UserError(f"{error} `train` wrote another: restore it.") from None
    if isinstance(tree.get("data"), dict):
        tree["data"].pop("source", None)
    foreign = sorted(_foreign_code(tree))
    if foreign and not trust_code:
        raise UserError(
            f"{path}: this run asks for code beyond pal_ds's own: {', '.join(foreign)}. {REMEDY}"
        )
    recipe, parser = yaml.safe_dump(tree, sort_keys=False), recipe_parser()
    consent = Consent(trust_code=trust_code)
    if trust_code:
        make_importable([Path.cwd(), path.parent / CODE])
    try:
        with consent.given((), recipe):
            config = _parsed(parser, [f"--config={recipe}"], consent, str(path))[0]
            if trust_code:
                refuse_changed_code(recipe, path.parent)
            return config
    except ArgumentError as error:
        raise UserError(f"{path}: {explained(str(error), parser)}") from None


def _foreign_code(tree: Mapping[str, Any]) -> set[str]:
    """The classes beyond pal_ds's own that a recipe names, and its keys that let code of other folders run."""
    keys = flattened(tree)
    return import_paths(tree) | {key for key in REMOTE_CODE if keys.get(key)}


def asks_for_code(recipe: str) -> bool:
    """Return whether a recipe (YAML) names classes beyond pal_ds's own, or lets code of other folders run."""
    return bool(_foreign_code(yaml.safe_load(recipe)))


def record_recipe(run: RunDirectory, recipe: str) -> None:
    """Write a resolved recipe (YAML) as the run's config.yaml, and the code of one's own that it names beside it.

    Raises:
        StorageError: they cannot be written.
    """
    keep_code(recipe, run.path)
    run.write_config(recipe)


def read(
    recipe: Recipe,
    overrides: Mapping[str, Any],
    *,
    require_head: bool = True,
    trust_code: bool = False,
) -> tuple[RunConfig, str]:
    """The recipe with dotted `overrides`, and its resolved YAML. What dicts and overrides name is allowed by this call.

    Raises:
        UserError: no such file or recipe, a key or value that no recipe has, a class that no import path names, or
            code that a file asks for without `trust_code`.
    """
    layers = recipe if isinstance(recipe, list | tuple) else [recipe]
    with tempfile.TemporaryDirectory(prefix="pal_ds_") as folder:
        files = [_file(layer, Path(folder, f"layer_{n}.yaml")) for n, layer in enumerate(layers)]
        for file in files:
            read_yaml(file, "recipe" if file.parent == Path(folder) else None)
        words = [f"--config={file}" for file in files]
        said = {key: plain(value, key) for key, value in overrides.items()}
        for key, value in said.items():
            words.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
        given = [yaml.safe_load(f.read_text()) for f in files if f.parent == Path(folder)]
        consent = Consent.of_call([*given, said], trust_code=trust_code)
        parser = recipe_parser(require_head=require_head)
        try:
            with consent.given(f for f in files if f.parent != Path(folder)):
                return _parsed(parser, words, consent, "recipe")
        except ArgumentError as error:
            shown = str(error).replace(f"{folder}/", "recipe, ")
            raise UserError(explained(shown, parser)) from None


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
    """Return what a recipe file would hold for a value of Python; `key` is where it stands.

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
    """Return what an object was made with, where its class keeps each argument under its name."""
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
