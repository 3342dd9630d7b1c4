"""A suite: one dataset and the methods that are held against each other on it, each resolved to an ordinary recipe."""

import difflib
import re
from argparse import ArgumentError
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from pal_ds.config.consent import Consent
from pal_ds.config.recipe import dump_recipe, made, recipe_parser
from pal_ds.config.run_config import RunConfig, check_range
from pal_ds.errors import UserError
from pal_ds.runs.run_dir import RunDirectory

RecipeKeys = dict[str, Any]
"""A part of a recipe as its YAML says it, before it is checked."""


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """The keys of a suite beside those of a recipe, which all of its methods share."""

    methods: dict[str, RecipeKeys] = field(default_factory=dict)
    """Name -> recipe keys that this method has of its own, laid over the shared ones as a second --config would be."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """`train.seed` of the runs of each method."""
    split: Literal["dev", "test"] = "test"
    """Whose pairs of seen users are scored, with the last checkpoint."""
    few_shot: list[int] = field(default_factory=list)
    """Comparisons that held-out users are fitted to, one value after the other; empty: nobody is held out."""
    num_draws: int = 20
    """Random draws of these comparisons."""
    about: str = ""
    """What is compared on what, for the head of the table."""
    needs: str = ""
    """What must be downloaded or given, told before anything else is done."""

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        check_range("methods", "empty", bool(self.methods), "a mapping of names to recipe keys")
        check_range("seeds", "empty", bool(self.seeds), "at least one number")
        for name in ("seeds", "few_shot"):
            values = getattr(self, name)
            sound = min(values, default=0) >= 0 and len(set(values)) == len(values)
            check_range(name, values, sound, "different numbers, 0 or more")
        check_range("num_draws", self.num_draws, self.num_draws >= 1, "at least 1")
        for name, keys in self.methods.items():
            _check_method(name, keys)


def _check_method(name: str, keys: RecipeKeys) -> None:
    """Raises UserError for a name that is no folder's, or keys that are not the method's to choose."""
    if re.fullmatch(r"[\w=+-][\w.=+-]*", name) is None:
        raise UserError(
            f"methods: {name!r} names a folder and a row of the table; use letters, digits and . _ = + - alone."
        )
    if "data" in keys:
        raise UserError(
            f"methods.{name}: has data of its own, and a suite compares on one dataset. Move it to the shared keys, "
            "or make two suites."
        )
    train = keys.get("train")
    if isinstance(train, dict) and "seed" in train:
        raise UserError(f"methods.{name}: sets train.seed. Seeds come from the suite's `seeds`.")


@dataclass(frozen=True)
class PlannedRun:
    """A run of a method with a seed: its run directory is like any other."""

    method: str
    seed: int
    config: RunConfig
    recipe: str
    """The recipe as YAML, for config.yaml."""
    run: RunDirectory


@dataclass(frozen=True)
class Suite:
    """A suite that was read and checked: its settings, and every run there is to make."""

    name: str
    settings: SuiteConfig
    planned: list[PlannedRun]
    trust_code: bool = False
    """Import the classes that the runs of `train.init_from` name beyond pal_ds's own."""

    def of(self, method: str) -> list[PlannedRun]:
        return [planned for planned in self.planned if planned.method == method]


def read_suite(
    name: str, settings: SuiteConfig, shared: str, out: Path, *, trust_code: bool = False
) -> Suite:
    """Resolve every method and seed of a suite, so that a mistake in the last is told before the first is trained.

    `shared` are the recipe keys of all methods (YAML), with or without a head; runs lie in OUT/runs/METHOD/seed_N. What
    `shared` asks for was allowed; what a method asks for beyond it needs `trust_code`.

    Raises:
        UserError: a method with keys, classes or values that no recipe has, or without a head.
    """
    parser, common = recipe_parser(), yaml.safe_load(shared)
    if common.get("head") is None:
        common.pop("head", None)
    if common["backbone"]["tuning"] == "frozen":
        # Without a cache every run and every evaluation would encode all texts again.
        common["backbone"].setdefault("cache", str(out / "cache"))
    planned = [
        PlannedRun(
            method, seed, config, recipe, RunDirectory(out / "runs" / method / f"seed_{seed}")
        )
        for method, keys in settings.methods.items()
        for seed, config, recipe in _resolve(
            parser, common, method, keys, settings.seeds, trust_code=trust_code
        )
    ]
    return Suite(name, settings, planned, trust_code)


def _resolve(
    parser: ArgumentParser,
    common: RecipeKeys,
    method: str,
    keys: RecipeKeys,
    seeds: list[int],
    *,
    trust_code: bool,
) -> Iterator[tuple[int, RunConfig, str]]:
    """Yield seed, recipe and the recipe's YAML, for each seed."""
    from pal_ds.config.parser import explained, parsed

    if "head" not in {**common, **keys}:
        raise UserError(f"methods.{method}: has no head, and the shared keys have none either.")
    layers = [f"--config={yaml.safe_dump(layer)}" for layer in (common, keys) if layer]
    consent = Consent(trust_code, spoken=common)
    try:
        options = parsed(parser, layers, "recipe")
        for seed in seeds:
            options["train.seed"] = seed
            yield seed, made(parser, options, consent), dump_recipe(options)
    except ArgumentError as error:
        raise UserError(f"methods.{method}: {explained(str(error), parser)}") from None
    except UserError as error:
        raise UserError(f"methods.{method}: {error}") from None


def only(suite: Suite, methods: list[str]) -> Suite:
    """Return the suite with the runs of these methods, or all where none is named. UserError: an unknown name."""
    for name in methods:
        if name not in suite.settings.methods:
            plain = {method.casefold(): method for method in suite.settings.methods}
            near = difflib.get_close_matches(name.casefold(), plain, n=1)
            hint = f" Did you mean {plain[near[0]]}?" if near else ""
            raise UserError(
                f"--only {name}: suite {suite.name} has no such method.{hint} It has "
                f"{', '.join(suite.settings.methods)}."
            )
    chosen = [planned for planned in suite.planned if not methods or planned.method in methods]
    return replace(suite, planned=chosen)
