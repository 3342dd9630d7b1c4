"""The commands around a training: what each takes and does, the seam between the command line and the library."""

import json
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.arguments import add_run_arguments, as_path, keys
from pal_ds.config.recipe import add_recipe_arguments, as_recipe, dump_recipe
from pal_ds.errors import UnfinishedError, UserError
from pal_ds.runs.run_dir import RunDirectory


class Prepare:
    """Raw preference data to prepared tables, users and splits."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        # Data can be prepared before anyone knows which head will read them.
        add_recipe_arguments(parser, require_head=False)

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.data.prepare import prepare

        prepare(as_recipe(options).data)


class Embed:
    """Encode all texts with a frozen backbone into `backbone.cache`; resumable, ends with 75 where it was stopped."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_recipe_arguments(parser)

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.distributed.preemption import listening

        recipe = as_recipe(options)
        with listening(recipe.train.stop_signals):
            from pal_ds.training.embed import embed

            came_to_the_end = embed(recipe)
        # On every rank, after they have parted: one that left before would look lost to the others.
        if not came_to_the_end:
            raise UnfinishedError(
                f"{recipe.backbone.cache}: stopped before every text was encoded; what was encoded is kept. Start the "
                f"same command again to encode the rest (exit code {UnfinishedError.exit_code})."
            )


class Train:
    """Train a reward model; resumes where the run directory holds checkpoints."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_recipe_arguments(parser)
        parser.add_argument("--run_dir", type=str, required=True, help="directory of the run")
        parser.add_argument(
            "--fresh", action="store_true", help="refuse a directory that is not empty"
        )
        parser.add_argument(
            "--allow_change", type=keys, default=[], help="KEY,.. that may differ on resume"
        )
        parser.add_argument(
            "--trust_checkpoint", action="store_true", help="read checkpoints of another owner"
        )

    @staticmethod
    def run(options: Namespace, unresolved: Namespace) -> None:
        from pal_ds.distributed.preemption import listening

        recipe = as_recipe(options)
        # From here on a signal asks for a checkpoint first, even while modules are still being loaded.
        with listening(recipe.train.stop_signals):
            from pal_ds.training.launch import launch_training

            launch_training(
                recipe,
                dump_recipe(unresolved),
                Path(options.run_dir),
                fresh=options.fresh,
                allow_change=options.allow_change,
                trust_checkpoint=options.trust_checkpoint,
            )


class Adapt:
    """Fit new users to a trained run from a few comparisons each; the model stays as it is."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_run_arguments(parser)
        parser.add_argument("--pairs", type=str, help="JSONL of the new users' comparisons")
        parser.add_argument(
            "--split",
            type=str,
            default="unseen_train",
            help="split of the run's data, without --pairs",
        )
        parser.add_argument(
            "--num_pairs", type=int, help="comparisons to keep per user; unset keeps all"
        )
        parser.add_argument("--seed", type=int, default=0, help="of the draw of comparisons")
        parser.add_argument(
            "--solver",
            type=Literal["auto", "newton", "adam", "reference"],
            default="auto",
            help="newton from statistics; adam, the same objective; reference, AdamW that stops early",
        )
        parser.add_argument(
            "--out", type=str, required=True, help="directory for the user table and its report"
        )

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.adaptation.run import AdaptOptions, adapt_run

        chosen = AdaptOptions(
            pairs=as_path(options.pairs),
            split=options.split,
            num_pairs=options.num_pairs,
            step=options.step,
            seed=options.seed,
            solver=options.solver,
            trust_checkpoint=options.trust_checkpoint,
        )
        report = adapt_run(RunDirectory(options.run_dir), Path(options.out), chosen)
        print(f"{len(report['users'])} users from {report['pairs']} pairs -> {options.out}")


class Users:
    """List the users of a run, or make it forget one."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--run_dir", type=str, required=True, help="directory that `train` wrote"
        )
        parser.add_argument(
            "--list", action="store_true", help="print user ids and mixtures as JSONL"
        )
        parser.add_argument("--remove", type=str, help="user id to forget")

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.engine.checkpoint.forget import forget_user
        from pal_ds.inference.list_users import list_users

        run = RunDirectory(options.run_dir)
        if options.list == (options.remove is not None):
            raise UserError("users: give exactly one of --list and --remove ID.")
        if options.list:
            for user_id, mixture in list_users(run):
                print(json.dumps({"user_id": user_id, "mixture": mixture}))
            return
        done = forget_user(run, options.remove)
        print(
            f"forgot {options.remove}: checkpoints {done['steps']}, evaluations {done['evaluations']}."
        )
        print(
            "The raw and prepared data, and models exported before, are not this run's: delete the user there too."
        )


class Report:
    """Pictures and a page for one run, or several side by side."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument(
            "--run_dirs", type=list[str], required=True, help="directories that `train` wrote"
        )
        parser.add_argument(
            "--out", type=str, required=True, help="directory for report.md and its pictures"
        )

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.eval.report import write_report

        names = [Path(path).name for path in options.run_dirs]
        # Two runs may end in the same name; then the whole path tells them apart.
        labels = names if len(set(names)) == len(names) else options.run_dirs
        runs = {
            label: RunDirectory(path) for label, path in zip(labels, options.run_dirs, strict=True)
        }
        for run in runs.values():
            run.require_run()
        print(write_report(runs, Path(options.out)))
