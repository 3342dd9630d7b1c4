"""A suite: one dataset and the methods that are held against each other on it, each resolved to an ordinary recipe."""

import difflib
import re
from argparse import ArgumentError
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from jsonargparse import ArgumentParser

from pal_ds.config.consent import Consent
from pal_ds.config.recipe import dump_recipe, made, recipe_parser
from pal_ds.config.run_config import RunConfig, check_range
from pal_ds.data.prepare import DataConfig
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
    folds: dict[str, RecipeKeys] = field(default_factory=dict)
    """Name -> keys of `data` laid over the shared ones: every method is trained once on each fold's data, which hold
    out another part, and figures are means over folds. Tables of a fold lie in data.path/NAME. Empty: one dataset."""
    reference: str | None = None
    """Method that the others are held against, pair by pair; unset: the first."""
    scratch: bool = True
    """Add a row in which each user has a logistic regression from scratch, where features are frozen."""
    users_above: list[int] = field(default_factory=list)
    """Add a column of users with more than so many comparisons in the data, for each number."""
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
        numbers = self.users_above
        check_range("users_above", numbers, min(numbers, default=0) >= 0, "numbers of 0 or more")
        named = self.reference is None or self.reference in self.methods
        check_range("reference", self.reference, named, f"one of {', '.join(self.methods)}")
        check_range("num_draws", self.num_draws, self.num_draws >= 1, "at least 1")
        for name, keys in self.methods.items():
            _check_method(name, keys)
        for name, keys in self.folds.items():
            _check_fold(name, keys)

    @property
    def reference_method(self) -> str:
        """Method that the others are held against."""
        return self.reference or next(iter(self.methods))


def _check_name(key: str, name: str) -> None:
    """Raises UserError for a name that is no folder's."""
    if re.fullmatch(r"[\w=+-][\w.=+-]*", name) is None:
        raise UserError(
            f"{key}: {name!r} names a folder and a row of the table; use letters, digits and . _ = + - alone."
        )


def _check_fold(name: str, keys: RecipeKeys) -> None:
    """Raises UserError for a name that is no folder's, or keys beyond those of the data."""
    _check_name("folds", name)
    if not isinstance(keys, dict) or [*keys] != ["data"] or not isinstance(keys["data"], dict):
        raise UserError(
            f"folds.{name}: must hold keys of `data` and nothing else, such as {{data: {{seed: 1}}}}; whatever else "
            "differs between runs is a method's."
        )


def _check_method(name: str, keys: RecipeKeys) -> None:
    """Raises UserError for a name that is no folder's, or keys that are not the method's to choose."""
    _check_name("methods", name)
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
    fold: str = ""
    """Name of the fold on whose data it is trained; empty where the suite has none."""


@dataclass(frozen=True)
class Suite:
    """A suite that was read and checked: its settings, and every run there is to make."""

    name: str
    settings: SuiteConfig
    planned: list[PlannedRun]
    """Runs by fold, method and seed."""
    out: Path
    trust_code: bool = False
    """Import the classes that the runs of `train.init_from` name beyond pal_ds's own."""

    @property
    def folds(self) -> list[str]:
        """Names of the folds, or the empty one of all data."""
        return [*self.settings.folds] or [""]

    def of(self, method: str, fold: str = "") -> list[PlannedRun]:
        """Runs of a method on the data of a fold, by seed."""
        runs = (planned for planned in self.planned if planned.method == method)
        return [planned for planned in runs if planned.fold == fold]


def read_suite(
    name: str, settings: SuiteConfig, shared: str, out: Path, *, trust_code: bool = False
) -> Suite:
    """Resolve every method and seed of a suite, so that a mistake in the last is told before the first is trained.

    `shared` are the recipe keys of all methods (YAML), with or without a head; runs lie in OUT/runs/METHOD/seed_N, or
    OUT/runs/METHOD/FOLD/seed_N. What `shared` asks for was allowed; what a method or a fold asks for beyond it needs
    `trust_code`.

    Raises:
        UserError: a method or fold with keys, classes or values that no recipe has, or a method without a head.
    """
    parser, common = recipe_parser(), yaml.safe_load(shared)
    if common.get("head") is None:
        common.pop("head", None)
    if common["backbone"]["tuning"] == "frozen":
        # Without a cache every run and every evaluation would encode all texts again.
        common["backbone"].setdefault("cache", str(out / "cache"))
    consent = Consent(trust_code, spoken=common)
    resolver = _Resolver(parser, common, settings.seeds, consent)
    of_methods = {method: resolver.runs(method, keys) for method, keys in settings.methods.items()}
    planned = []
    for fold, data in _data_of_folds(settings.folds, common, consent).items() or [("", None)]:
        for method, runs in of_methods.items():
            for seed, config, recipe in runs:
                run = RunDirectory(out / "runs" / method / fold / f"seed_{seed}")
                if data is not None:
                    config = replace(config, data=data.config)
                    tree = {**yaml.safe_load(recipe), "data": data.keys}
                    recipe = yaml.safe_dump(tree, sort_keys=False)
                planned.append(PlannedRun(method, seed, config, recipe, run, fold))
    return Suite(name, settings, planned, out, trust_code)


class _FoldData(NamedTuple):
    """Section `data` of a fold's recipes: as an object, and as YAML says it."""

    config: DataConfig
    keys: RecipeKeys


def _data_of_folds(
    folds: dict[str, RecipeKeys], common: RecipeKeys, consent: Consent
) -> dict[str, _FoldData]:
    """Resolve the data of each fold. Raises UserError for keys or values that `data` does not have."""
    from pal_ds.config.parser import explained, objects_of, parsed

    parser, resolved = _data_parser(), {}
    for fold, own in folds.items():
        place = {"data": {"path": str(Path(common["data"]["path"], fold))}}
        layers = ({"data": common["data"]}, place, own)
        try:
            words = [f"--config={yaml.safe_dump(layer)}" for layer in layers]
            options = parsed(parser, words, "recipe")
            consent.check(options)
            keys = yaml.safe_load(parser.dump(options, skip_validation=True))["data"]
            resolved[fold] = _FoldData(objects_of(parser, options)["data"], keys)
        except ArgumentError as error:
            raise UserError(f"folds.{fold}: {explained(str(error), parser)}") from None
        except UserError as error:
            raise UserError(f"folds.{fold}: {error}") from None
    return resolved


def _data_parser() -> ArgumentParser:
    """Return a parser of the keys of `data` alone, as they stand in a recipe; raises as `recipe_parser`'s does."""
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(DataConfig, "data")
    return parser


class _Resolver(NamedTuple):
    """Makes the recipes of methods from the keys that all of them share."""

    parser: ArgumentParser
    common: RecipeKeys
    seeds: list[int]
    consent: Consent

    def runs(self, method: str, keys: RecipeKeys) -> list[tuple[int, RunConfig, str]]:
        """Return seed, recipe and the recipe's YAML, for each seed. Raises UserError for what no recipe has."""
        from pal_ds.config.parser import explained, parsed

        if "head" not in {**self.common, **keys}:
            raise UserError(f"methods.{method}: has no head, and the shared keys have none either.")
        words = [f"--config={yaml.safe_dump(layer)}" for layer in (self.common, keys) if layer]
        made_runs = []
        try:
            options = parsed(self.parser, words, "recipe")
            for seed in self.seeds:
                options["train.seed"] = seed
                recipe = dump_recipe(options, self.parser)
                made_runs.append((seed, made(self.parser, options, self.consent), recipe))
        except ArgumentError as error:
            raise UserError(f"methods.{method}: {explained(str(error), self.parser)}") from None
        except UserError as error:
            raise UserError(f"methods.{method}: {error}") from None
        return made_runs


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
