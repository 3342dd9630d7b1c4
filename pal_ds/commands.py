"""What each command takes and does: the seam between the command line and the library."""

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from pal_ds.recipe import add_recipe_arguments, as_recipe, dump_recipe


class Prepare:
    """Raw preference data to prepared tables, users and splits."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_recipe_arguments(parser)

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.data.prepare import prepare

        prepare(as_recipe(options).data)


class Train:
    """Train a reward model; resumes where the run directory holds checkpoints."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_recipe_arguments(parser)
        parser.add_argument("--run_dir", type=str, required=True, help="directory of the run")
        parser.add_argument("--fresh", action="store_true", help="refuse a directory that is not empty")
        parser.add_argument("--allow_change", type=list[str], default=[], help="keys that may differ on resume")
        parser.add_argument("--trust_checkpoint", action="store_true", help="read checkpoints of another owner")

    @staticmethod
    def run(options: Namespace, unresolved: Namespace) -> None:
        from pal_ds.launch import launch_training

        launch_training(
            as_recipe(options),
            dump_recipe(unresolved),
            Path(options.run_dir),
            fresh=options.fresh,
            allow_change=options.allow_change,
            trust_checkpoint=options.trust_checkpoint,
        )


COMMANDS: dict[str, Any] = {"prepare": Prepare, "train": Train}
