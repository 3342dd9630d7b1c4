"""Options and values that several commands read, and the files that `--config` names."""

import argparse
import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.command_table import COMMANDS
from pal_ds.errors import UserError
from pal_ds.io.files import at_home
from pal_ds.io.yaml_files import read_yaml

STEP: dict[str, Any] = {"type": str, "default": "latest", "help": "a number, latest or best"}
TRUST: dict[str, Any] = {
    "action": "store_true",
    "help": "read what another owner, or anyone, may have written",
}
TRUST_CODE: dict[str, Any] = {
    "action": "store_true",
    "help": "import classes that the run names beyond pal_ds's own, and run code of its backbone",
}


@contextlib.contextmanager
def imports_at_once() -> Iterator[None]:
    """Import heavy libraries within the block a fifth faster: their objects stay, so nothing is collected meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        # Nothing imported goes away: a full collection over all of it takes a quarter of a second.
        gc.freeze()
        if was_enabled:
            gc.enable()


def add_run_arguments(parser: ArgumentParser) -> None:
    """Which checkpoint of which run."""
    parser.add_argument("--run_dir", type=str, required=True, help="directory that `train` wrote")
    parser.add_argument("--step", **STEP)
    add_trust(parser)


def add_trust(parser: ArgumentParser) -> None:
    """The two flags of a command that reads a run."""
    parser.add_argument("--trust_checkpoint", **TRUST)
    parser.add_argument("--trust_code", **TRUST_CODE)


def leave_of(options: Namespace) -> dict[str, bool]:
    """The two flags as functions take them that open a run."""
    return {"trust": options.trust_checkpoint, "trust_code": options.trust_code}


def options_of(cls: type, options: Namespace, **others: object) -> Any:
    """The dataclass `cls` of the options that have its fields' names, and of `others`."""
    given = {field.name: options[field.name] for field in fields(cls) if field.name in options}
    return cls(**{**given, **others})


def as_path(text: str | None) -> Path | None:
    """None stays None."""
    return None if text is None else at_home(text)


@dataclass(frozen=True, repr=False)
class Shown:
    """The type of an option, shown by a name in `--help`; `parse` makes its value, and leaves one that is made."""

    name: str
    parse: Callable[..., list[Any]]

    def __call__(self, text: str | list[Any]) -> list[Any]:
        return self.parse(text)

    def __repr__(self) -> str:
        return self.name


def _keys(text: str | list[str]) -> list[str]:
    """Names separated by commas, in brackets or not."""
    if isinstance(text, list) and all(isinstance(name, str) for name in text):
        return text
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no list of names, as in a,b")
    return [name.strip() for name in text.strip("[] ").split(",") if name.strip()]


def split_words(words: list[str]) -> list[str]:
    """The values of an option that takes several: apart, or separated by commas, in brackets or not.

    >>> split_words(["runs/a", "runs/b"]), split_words(["[runs/a,runs/b]"]), split_words(["1,2", "4"])
    (['runs/a', 'runs/b'], ['runs/a', 'runs/b'], ['1', '2', '4'])
    """
    # A file or folder may have a comma in its name.
    return [part for word in words for part in ([word] if Path(word).exists() else _keys(word))]


def whole_numbers(option: str, words: list[str]) -> list[int]:
    """The numbers that an option took. Raises UserError for what is none."""
    try:
        return [int(word) for word in split_words(words)]
    except ValueError:
        raise UserError(
            f"{option}: {' '.join(words)} are no whole numbers, as in 0 4 16."
        ) from None


def _mixture(text: str | list[float]) -> list[float]:
    """Weights separated by commas, `0.2,0.8`; whether they fit a head is checked where one is."""
    if isinstance(text, list) and all(type(part) in (int, float) for part in text):
        # jsonargparse runs the type once more over what it gave.
        return text
    try:
        return [float(part) for part in str(text).split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers separated by commas, as in 0.2,0.8"
        ) from None


keys, mixture = Shown("list of names", _keys), Shown("list of numbers", _mixture)


def with_shipped_files(arguments: list[str]) -> list[str]:
    """The arguments, with its path for each `--config` that is no file but the name of a shipped recipe, or suite."""
    resolved, folder = list(arguments), _shipped_folder(arguments)
    for position, before, name in _group_files(arguments) if folder else ():
        # A bare name would be taken for the path of a class.
        resolved[position] = f"{before}{Path(name).absolute()}"
    for position, before, name in _config_options(arguments):
        shipped = Path(folder or "", f"{name}.yaml")
        if not Path(name).is_file() and Path(name).name == name and shipped.is_file():
            resolved[position] = f"{before}{shipped}"
    return resolved


def _group_files(arguments: list[str]) -> Iterator[tuple[int, str, str]]:
    """(position, what stands before the value there, value) of each group of keys that is given as a file: --loss F."""
    for position, (previous, argument) in enumerate(pairwise(arguments), start=1):
        option, equals, value = argument.partition("=")
        before = f"{option}{equals}"
        if not equals and previous.startswith("--") and "=" not in previous:
            option, before, value = previous, "", argument
        in_groups = option in ("--data", "--backbone", "--loss", "--users", "--optim", "--train")
        if in_groups and value.endswith((".yaml", ".yml")) and Path(value).is_file():
            yield position, before, value


def config_files(arguments: list[str]) -> list[Path]:
    """The file of each `--config` of a command that reads recipes, in order, whether it exists or not."""
    return [Path(name) for _, _, name in _config_options(arguments)]


def _config_options(arguments: list[str]) -> Iterator[tuple[int, str, str]]:
    """(position, what stands before the value there, value) of each `--config` of a command that reads recipes."""
    given = pairwise(arguments) if _shipped_folder(arguments) else ()
    for position, (previous, argument) in enumerate(given, start=1):
        if argument.startswith("--config="):
            yield position, "--config=", argument.removeprefix("--config=")
        elif previous == "--config":
            yield position, "", argument


def check_config_files(arguments: list[str]) -> None:
    """Raises UserError, with file and line, for a `--config` that is missing, no YAML mapping, or has `config`.

    For a suite, too, in a command that reads recipes.
    """
    folder = _shipped_folder(arguments)
    for path in config_files(arguments):
        if not path.is_file():
            if folder is not None and Path(folder.parent, "suites", f"{path}.yaml").is_file():
                raise UserError(_is_suite(path))
            shipped = sorted(file.stem for file in folder.glob("*.yaml")) if folder else []
            named = f" Shipped are {', '.join(shipped)}." if path.name == str(path) else ""
            raise UserError(f"--config {path}: no such file (looked from {Path.cwd()}).{named}")
        keys = read_yaml(path)
        if "methods" in keys and folder is not None and folder.name != "suites":
            raise UserError(_is_suite(path))
        if "config" in keys:
            raise UserError(
                f"{path}: `config` is no key of a recipe. Give several files as --config A --config B."
            )


def _is_suite(path: Path) -> str:
    return (
        f"--config {path}: this is a suite, of which `compare` alone makes recipes: `pal-ds compare --config {path} "
        "--out OUT` prepares its data, and trains and evaluates its methods. Each run in OUT has a recipe, config.yaml."
    )


def _shipped_folder(arguments: list[str]) -> Path | None:
    entry = COMMANDS.get(arguments[0]) if arguments else None
    if entry is None or entry.shipped is None:
        return None
    return Path(__file__).parents[1] / entry.shipped
