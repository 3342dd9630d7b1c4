"""Recipes as YAML: reading, writing, and the keys that two of them differ in."""

from argparse import ArgumentError
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from pal_ds.config.own_code import CODE, keep_code, make_importable, refuse_changed_code
from pal_ds.config.run_config import KEYS_THAT_DO_NOT_ALTER_RESULTS, RunConfig
from pal_ds.errors import UserError
from pal_ds.heads.base import Head
from pal_ds.runs.run_dir import RunDirectory

# What a key of any type holds is data: jsonargparse would make an object of a class that is named in it.
set_parsing_settings(instantiate_subclass_spec_in_any=False)


def add_recipe_arguments(parser: ArgumentParser, *, require_head: bool = True) -> None:
    """Add --config and every key of a recipe to a parser."""
    import pal_ds.data.sources
    import pal_ds.heads  # noqa: F401  short class names resolve once their modules are imported

    parser.add_argument(
        "--config", action="config", help="YAML recipe; repeat to layer, later wins"
    )
    parser.add_class_arguments(RunConfig, nested_key=None, skip=set() if require_head else {"head"})
    if not require_head:
        parser.add_argument("--head", type=Callable[[int], Head] | None, default=None)


def as_recipe(options: Namespace) -> RunConfig:
    """Return the recipe among the instantiated options of a command."""
    return RunConfig(**{name: options[name] for name in RunConfig.__dataclass_fields__})


def recipe_parser(*, require_head: bool = True) -> ArgumentParser:
    """Return a parser of recipes alone; it raises ArgumentError for what no recipe has."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_recipe_arguments(parser, require_head=require_head)
    return parser


def dump_recipe(options: Namespace) -> str:
    """Return the resolved recipe as YAML; `--config` on it gives the same run again."""
    chosen = Namespace(**{name: options[name] for name in RunConfig.__dataclass_fields__})
    return recipe_parser().dump(chosen, skip_validation=True)


def read_recipe(arguments: list[str]) -> tuple[RunConfig, str]:
    """Return the recipe that command-line arguments (--config and dotted keys) describe, and its YAML.

    Raises:
        UserError: a key or value that no recipe has.
    """
    files = [Path(word.partition("=")[2]) for word in arguments if word.startswith("--config=")]
    make_importable([Path.cwd(), *(file.parent for file in files)])
    parser = recipe_parser()
    try:
        options = parser.parse_args(arguments)
        return as_recipe(parser.instantiate(options)), dump_recipe(options)
    except ArgumentError as error:
        raise UserError(f"{' '.join(arguments)}: {error}") from None


def recipe_from_arguments(arguments: list[str]) -> RunConfig:
    """Return the recipe that command-line arguments describe. Raises UserError as `read_recipe` does."""
    return read_recipe(arguments)[0]


def load_recipe(path: Path) -> RunConfig:
    """Read the recipe of a run's config.yaml, with classes of one's own from the copy that the run keeps.

    Raises:
        UserError: a key or value that no recipe has, or code at hand that is not what the run was trained with.
    """
    make_importable([Path.cwd(), path.parent / CODE])
    config = recipe_from_arguments([f"--config={path}"])
    refuse_changed_code(path.read_text(), path.parent)
    return config


def record_recipe(run: RunDirectory, recipe: str) -> None:
    """Write a resolved recipe (YAML) as the run's config.yaml, and the code of one's own that it names beside it.

    Raises:
        StorageError: they cannot be written.
    """
    keep_code(recipe, run.path)
    run.write_config(recipe)


def _flat(tree: object, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix.rstrip("."): tree}
    merged: dict[str, Any] = {}
    for key, value in tree.items():
        merged |= _flat(value, f"{prefix}{key}.")
    return merged


def changed_keys(old: str, new: str) -> list[str]:
    """Return the dotted keys that differ between two recipes (YAML text) and may alter the result, sorted.

    >>> changed_keys("train: {seed: 0, log_every: 1}", "train: {seed: 1, log_every: 50}")
    ['train.seed']
    """
    before, after = _flat(yaml.safe_load(old)), _flat(yaml.safe_load(new))
    differing = (key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return sorted(key for key in differing if not key.startswith(KEYS_THAT_DO_NOT_ALTER_RESULTS))


def refuse_changes(run_config_file: Path, new: str, allowed: list[str]) -> None:
    """Raise UserError, naming the keys, where a resumed run would not be the run that was started."""
    old = run_config_file.read_text()
    try:
        yaml.safe_load(old)
    except yaml.YAMLError as error:
        raise UserError(
            f"{run_config_file}: not valid YAML ({' '.join(str(error).split())}). Restore it, or start in another "
            "--run_dir."
        ) from None
    refused = [key for key in changed_keys(old, new) if key not in allowed]
    if refused:
        before, after = _flat(yaml.safe_load(old)), _flat(yaml.safe_load(new))
        listing = "; ".join(f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in refused)
        raise UserError(
            f"{run_config_file}: this run was started with other values: {listing}. Restore them, pass "
            f"--allow_change {','.join(refused)}, or start in another --run_dir."
        )
