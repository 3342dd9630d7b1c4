"""The commands up to a trained run: data, cached states, trainings alone or as a suite, and what a training needs."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.arguments import STEP, TRUST, keys
from pal_ds.config.changes import refuse_unknown_keys
from pal_ds.config.recipe import add_recipe_arguments, as_recipe, dump_recipe
from pal_ds.config.run_config import RunConfig
from pal_ds.errors import UnfinishedError, UserError
from pal_ds.io.files import at_home

if TYPE_CHECKING:
    from pal_ds.compare.suite import Suite
    from pal_ds.data.prepare import DataConfig
    from pal_ds.modeling.memory_plan import MemoryPlan

GIB = 2**30


class Prepare:
    """Raw preference data to prepared tables, users and splits."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        # Data can be prepared before anyone knows which head will read them.
        add_recipe_arguments(parser, require_head=False)
        parser.add_argument(
            "--prepare_again",
            action="store_true",
            help="replace what other settings made at data.path, once the new data are whole",
        )

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.data.prepare import prepare
        from pal_ds.modeling.lengths import data_to_prepare

        prepare(data_to_prepare(as_recipe(options)), again=options.prepare_again)


class Embed:
    """Encode all texts with a frozen backbone into `backbone.cache`; resumable, ends with 75 where it was stopped."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add_recipe_arguments(parser)

    @staticmethod
    def run(options: Namespace, unresolved: Namespace) -> None:
        from pal_ds.distributed.preemption import listening

        recipe = as_recipe(options)
        with listening(recipe.train.stop_signals, may_end_process=True):
            from pal_ds.training.embed import embed

            came_to_the_end = embed(recipe, dump_recipe(unresolved))
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
        add = parser.add_argument
        add_recipe_arguments(parser)
        add("--run_dir", type=str, required=True, help="directory of the run")
        add("--fresh", action="store_true", help="refuse a directory that is not empty")
        add("--allow_change", type=keys, default=[], help="KEY,.. that may differ on resume")
        add("--trust_checkpoint", **TRUST)

    @staticmethod
    def run(options: Namespace, unresolved: Namespace) -> None:
        from pal_ds.distributed.preemption import listening

        recipe, resolved = as_recipe(options), dump_recipe(unresolved)
        refuse_unknown_keys(options.allow_change, resolved)
        # From here on a signal asks for a checkpoint first, even while modules are still being loaded.
        with listening(recipe.train.stop_signals, may_end_process=True):
            from pal_ds.training.launch import launch_training

            launch_training(
                recipe,
                resolved,
                at_home(options.run_dir),
                fresh=options.fresh,
                allow_change=options.allow_change,
                trust_checkpoint=options.trust_checkpoint,
                trust_code=options.trust_code,
            )


class Compare:
    """Train and evaluate a suite of methods over seeds on one dataset; resumable, ends in a table with intervals."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        from pal_ds.compare.suite import SuiteConfig

        add = parser.add_argument
        add_recipe_arguments(parser, require_head=False)
        parser.add_class_arguments(SuiteConfig, nested_key=None)
        add("--out", type=str, required=True, help="directory of runs and table")
        add("--only", type=keys, default=[], help="METHOD,.. to run; all of them by default")

    @staticmethod
    def run(options: Namespace, unresolved: Namespace) -> None:
        from pal_ds.compare.suite import only
        from pal_ds.distributed.preemption import listening

        out = at_home(options.out)
        suite = suite_of(options, unresolved)
        chosen = only(suite, options.only)
        signals = chosen.planned[0].config.train.stop_signals
        with listening(signals, may_end_process=True):
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
    shared = dump_recipe(unresolved)
    return read_suite(name, settings, shared, at_home(options.out), trust_code=options.trust_code)


class Plan:
    """Parameters and bytes per GPU of a recipe under ZeRO-3, from the backbone's config.json alone.

    Nothing is allocated, and nothing downloaded but that config. All other options are those of `train`.
    """

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--num_gpus", type=int, required=True, help="of all nodes together")
        add_recipe_arguments(parser)

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        if options.num_gpus < 1:
            raise UserError(f"--num_gpus is {options.num_gpus}; it must be at least 1.")
        plan = plan_of(as_recipe(options), options.num_gpus)
        print(
            f"{options.num_gpus} GPUs, {plan.num_parameters:,} parameters, {plan.num_trained:,} trained"
        )
        for name in ("weights", "optimizer", "gathered", "buckets", "activations", "total"):
            print(f"{name:12}{getattr(plan, name) / GIB:8.1f} GiB")


def plan_of(config: RunConfig, num_gpus: int, *, from_disk_only: bool = False) -> "MemoryPlan":
    """Return the bytes per GPU of a recipe. Raises UserError where the backbone's config cannot be had."""
    from pal_ds.backbones.transformer import architecture_config, read_model_config
    from pal_ds.modeling.memory_plan import plan_memory

    if config.backbone.architecture is None:
        model_config = read_model_config(config.backbone, from_disk_only=from_disk_only)
    else:
        model_config = architecture_config(config.backbone, _vocab_size(config.data))
    return plan_memory(config, model_config, num_gpus)


def _vocab_size(data: "DataConfig") -> int:
    """Rows of a new embedding: tokens of the prepared data, or, until there are any, what the recipe asks for."""
    from pal_ds.data.tables import INFO_NAME, read_info

    tokens = (
        read_info(Path(data.path)).get("tokens") if Path(data.path, INFO_NAME).is_file() else None
    )
    return data.vocab_size if tokens is None else tokens["vocab_size"]


class Reshard:
    """Rewrite a checkpoint for another number of ranks, as if they had written it.

    `train` does the same by itself when it resumes on another number of ranks; this is for a job that is to start at
    once. The step keeps its number and its place in RUN; the old one stays until the new one is whole on the disk.
    Weights, moments, step counts, buffers and users keep every bit, so going back is this again with the old W. One
    process, no GPU; memory is one shard.
    """

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add = parser.add_argument
        add("run", type=str, help="directory that `train` wrote")
        add("--world_size", type=int, required=True, metavar="W", help="ranks to come")
        add("--step", **STEP)
        add("--trust_checkpoint", **TRUST)

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        # DeepSpeed is imported for its defaults alone, and should neither look for a GPU nor say so.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from pal_ds.engine.checkpoint.reshard import exchange_step
        from pal_ds.runs.run_dir import RunDirectory

        if options.world_size < 1:
            raise UserError(f"--world_size is {options.world_size}; it must be at least 1.")
        run = RunDirectory(options.run)
        print(exchange_step(run, options.world_size, options.step, trust=options.trust_checkpoint))
