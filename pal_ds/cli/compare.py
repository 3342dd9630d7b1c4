"""`compare` on the command line."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.arguments import keys
from pal_ds.config.recipe import add_recipe_arguments, dump_recipe
from pal_ds.errors import UnfinishedError, UserError

if TYPE_CHECKING:
    from pal_ds.compare.suite import Suite


class Compare:
    """Train and evaluate a suite of methods over seeds on one dataset; resumable, ends in a table with intervals."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        from pal_ds.compare.suite import SuiteConfig

        add_recipe_arguments(parser, require_head=False)
        parser.add_class_arguments(SuiteConfig, nested_key=None)
        parser.add_argument("--out", type=str, required=True, help="directory of runs and table")
        parser.add_argument(
            "--only", type=keys, default=[], help="METHOD,.. to run; all of them by default"
        )

    @staticmethod
    def run(options: Namespace, unresolved: Namespace) -> None:
        from pal_ds.compare.suite import only
        from pal_ds.distributed.preemption import listening

        out = Path(options.out)
        suite = suite_of(options, unresolved)
        chosen = only(suite, options.only)
        with listening(chosen.planned[0].config.train.stop_signals):
            from pal_ds.compare.runs import compare

            stopped = compare(suite, chosen, out)
        # On every rank, after they have parted: one that left before would look lost to the others.
        if stopped is not None:
            raise UnfinishedError(
                f"{out}: {stopped}. The same command goes on from there (exit code {UnfinishedError.exit_code})."
            )
        if os.environ.get("RANK", "0") == "0":
            print(out / "table.md")


def suite_of(options: Namespace, unresolved: Namespace) -> "Suite":
    """The suite that the command line describes, every method of it resolved. Raises UserError for a mistake in it."""
    from pal_ds.compare.suite import SuiteConfig, read_suite

    if not options.config:
        raise UserError("compare: give --config SUITE, a file or the name of a shipped suite.")
    settings = SuiteConfig(**{name: options[name] for name in SuiteConfig.__dataclass_fields__})
    name = Path(str(options.config[0])).stem
    return read_suite(name, settings, dump_recipe(unresolved), Path(options.out))
