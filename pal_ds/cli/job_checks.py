"""Checks of a job before `submit` hands it in: its size, its recipe, data and earlier checkpoints."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from pal_ds.cli.arguments import check_config_files, config_files
from pal_ds.cli.main import build_parser
from pal_ds.errors import UserError
from pal_ds.runs.lock import LOCK
from pal_ds.runs.run_dir import RunDirectory

if TYPE_CHECKING:
    from pal_ds.config.run_config import RunConfig

Checked = tuple[Path, list[str], list[str]]
"""Where the record of the submission goes, the words after the script's name, and what to tell the user."""


def check_train(options: Namespace, words: list[str]) -> Checked:
    """A training: its run directory, the words of its script, and notes for the user."""
    recipe = one_argument(options, "RECIPE")
    run_dir = Path(options.run_dir or Path("runs") / Path(recipe).stem)
    notes = check_recipe(options, recipe, run_dir, words)
    return run_dir, [as_word(recipe), f"--run_dir={run_dir}", *words], notes


def check_sweep(options: Namespace, words: list[str]) -> Checked:
    """Seeds of one recipe, or several recipes side by side, each a training of its own."""
    recipes, into = options.arguments, Path(options.run_dir or "runs")
    last = array_bounds(options.array)[1]
    if 1 < len(recipes) <= last:
        raise UserError(
            f"--array {options.array}: only {len(recipes)} recipes are given, counted from 0."
        )
    first = array_bounds(options.array)[0]
    names = [Path(recipe).stem for recipe in recipes]
    if len(set(names)) < len(names):
        raise UserError(
            f"two recipes of one name in {' '.join(recipes)}: they would share a run directory. Rename one."
        )
    notes: list[str] = []
    if len(recipes) == 1:
        for seed in range(first, last + 1):
            # All seeds are of one recipe: what differs is what lies in their directories.
            if seed == first or (into / names[0] / f"seed_{seed}").exists():
                seeded = [*words, f"--train.seed={seed}"]
                run_dir = into / names[0] / f"seed_{seed}"
                notes += check_recipe(options, recipes[0], run_dir, seeded)
    else:
        for recipe, name in zip(recipes, names, strict=True):
            notes += check_recipe(options, recipe, into / name, words)
    return into, [*map(as_word, recipes), f"--run_dir={into}", *words], notes


def check_recipe(options: Namespace, recipe: str, run_dir: Path, words: list[str]) -> list[str]:
    """Check that these nodes could train this recipe here; return notes for the user.

    Raises:
        UserError: the recipe, its ds_config, its data or the run's earlier checkpoints do not fit the request.
    """
    from pal_ds.config.changes import refuse_changes, refuse_unknown_keys
    from pal_ds.config.consent import Consent
    from pal_ds.config.parser import objects_of, parsed
    from pal_ds.config.recipe import as_recipe, dump_recipe
    from pal_ds.engine.ds_config import ds_config_of

    arguments = ["train", f"--config={recipe}", f"--run_dir={run_dir}", *words]
    check_config_files(arguments)
    parser = build_parser("train", program="submit")
    consent = Consent.of_words(arguments)
    with consent.given(config_files(arguments)):
        given = parsed(parser, arguments, "recipe")
        consent.check(given["train"])
        config = as_recipe(objects_of(parser, given)["train"])
        resolved = dump_recipe(given["train"])
    refuse_unknown_keys(given["train"].allow_change, resolved)
    world_size = options.nodes * options.ntasks_per_node
    ds_config_of(config.train, world_size)
    if config.train.batch_pairs < world_size:
        raise UserError(
            f"{recipe}: train.batch_pairs is {config.train.batch_pairs} and the job has {world_size} ranks; some would "
            f"never see a comparison. Ask for fewer, or set train.batch_pairs to {world_size} or more."
        )
    check_stop_signals(recipe, config.train.stop_signals)
    check_prepared(options, recipe, config.data.path)
    run = RunDirectory(run_dir)
    found = {path.name for path in run_dir.iterdir()} if run_dir.is_dir() else set()
    if given["train"].fresh and found - {LOCK, "slurm"}:
        raise UserError(f"{run_dir}: --fresh needs an empty directory. Name another --run_dir.")
    notes = [] if options.gpus_per_node == 0 else [memory_note(config, world_size)]
    steps = run.complete_steps()
    if not steps:
        return notes
    refuse_changes(run.config_file, resolved, given["train"].allow_change)
    manifest = json.loads((run.checkpoint(steps[-1]) / "manifest.json").read_text())
    notes.append(f"{run_dir}: resumes from update {steps[-1]}.")
    if manifest["world_size"] != world_size:
        notes.append(
            f"its checkpoint is of {manifest['world_size']} ranks and will be resharded to {world_size}: the order of "
            "comparisons stays, the last bits of the weights may not."
        )
    return notes


def memory_note(config: "RunConfig", world_size: int) -> str:
    """Return what `plan` says of a recipe on these GPUs, in one line, or why it says nothing."""
    from pal_ds.cli.training_commands import GIB, plan_of

    try:
        plan = plan_of(config, world_size, from_disk_only=True)
    except UserError as error:
        return f"memory was not planned: {error}"
    return (
        f"each of {world_size} GPUs needs about {plan.total / GIB:.1f} GiB, and a tenth more for fragments "
        "(`pal-ds plan` shows the parts)."
    )


def check_stop_signals(recipe: str, signals: Sequence[str]) -> None:
    """Raises UserError where the ranks would die of what asks them to save."""
    if "USR2" not in signals:
        raise UserError(
            f"{recipe}: train.stop_signals is {', '.join(signals)}, and the job tells its ranks to save by USR2. Add "
            "USR2, or leave the key out."
        )


def check_prepared(options: Namespace, recipe: str, data: str) -> None:
    """Raises UserError where several nodes would need data that nobody has prepared."""
    if options.nodes > 1 and not Path(data, "dataset.json").is_file():
        raise UserError(
            f"{data}: not prepared, and {options.nodes} nodes would wait for it. "
            f"Run `pal-ds prepare --config {recipe}` once first."
        )


def check_embed(options: Namespace, words: list[str]) -> Checked:
    """An `embed`, whose record lies in its cache."""
    from pal_ds.config.recipe import recipe_from_arguments
    from pal_ds.training.embed import refuse_what_has_no_cache

    for name in ("run_dir", "array"):
        if options[name] is not None:
            raise UserError(
                f"--{name} {options[name]}: embed fills the one folder backbone.cache, by all ranks of one job. Leave "
                f"--{name} out."
            )
    recipe = one_argument(options, "RECIPE")
    check_config_files(["embed", f"--config={recipe}", *words])
    config = recipe_from_arguments([f"--config={recipe}", *words])
    refuse_what_has_no_cache(config)
    check_stop_signals(recipe, config.train.stop_signals)
    check_prepared(options, recipe, config.data.path)
    return Path(str(config.backbone.cache)), [as_word(recipe), *words], []


def check_evaluate(options: Namespace, words: list[str]) -> Checked:
    """An evaluation of a run that has a checkpoint."""
    run = one_argument(options, "RUN")
    check_run(run)
    return Path(run), [as_word(run), *words], []


def check_adapt(options: Namespace, words: list[str]) -> Checked:
    """New users in shards: as many users as shards, or more, and shards that count from 0."""
    from pal_ds.data.sources.base import read_lines

    if len(options.arguments) != 3:
        raise UserError(f"adapt takes RUN PAIRS OUT; given are {' '.join(options.arguments)}.")
    run, pairs, out = options.arguments
    check_run(run)
    if not Path(pairs).is_file():
        raise UserError(f"{pairs}: no such file; adapt reads comparisons of new users, as JSONL.")
    first, last = array_bounds(options.array)
    begun = Path(out, "shards", "count")
    if begun.is_file():
        if last >= int(begun.read_text()):
            raise UserError(
                f"{out}: was begun with {begun.read_text().strip()} shards, --array {options.array} asks for more. "
                "Name another OUT."
            )
    elif first != 0:
        raise UserError(f"--array {options.array}: the shards of a new OUT count from 0.")
    users: set[str] = set()
    for where, record in read_lines(Path(pairs)):
        if len(users) > last:
            break
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object. Mend the line.")
        users.add(str(record.get("user_id")))
    if len(users) <= last:
        raise UserError(
            f"--array {options.array}: {last + 1} shards for {len(users)} users in {pairs}. Ask for fewer."
        )
    return Path(out), [*map(as_word, (run, pairs, out)), *words], []


def as_word(path: str) -> str:
    """A path among the words of a script, so that nothing takes it for an option."""
    return f"./{path}" if path.startswith("-") else path


def one_argument(options: Namespace, name: str) -> str:
    """The one argument of a job that takes one. Raises UserError for another number."""
    if len(options.arguments) != 1:
        raise UserError(
            f"{options.job} takes one {name}; given are {' '.join(options.arguments)}. Words of the pal-ds command go "
            "after `--`."
        )
    return options.arguments[0]


def check_run(path: str) -> None:
    """Raises UserError where no run with a checkpoint lies."""
    run = RunDirectory(path)
    run.require_run()
    run.resolve_step("latest")


JOBS: dict[str, Callable[[Namespace, list[str]], Checked]] = {
    "train": check_train,
    "embed": check_embed,
    "evaluate": check_evaluate,
    "adapt": check_adapt,
    "sweep": check_sweep,
}


def check_shape(options: Namespace) -> None:
    """Fills what is left out. Raises UserError where tasks and GPUs do not match."""
    gpus, tasks = options.gpus_per_node, options.ntasks_per_node
    for name, least in (("nodes", 1), ("gpus_per_node", 0), ("cpus_per_task", 1)):
        value = options[name]
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}.")
    if tasks is not None and tasks < 1:
        raise UserError(f"--ntasks_per_node is {tasks}; it must be at least 1.")
    if gpus and tasks not in (None, gpus):
        raise UserError(
            f"--ntasks_per_node {tasks} with --gpus_per_node {gpus}: a rank drives one GPU. Leave "
            "--ntasks_per_node out, or set --gpus_per_node 0 to train on CPUs."
        )
    options.ntasks_per_node = tasks or gpus or 1
    if options.array is None and options.job in ("adapt", "sweep"):
        options.array = "0-0"
    if options.array is not None and not re.fullmatch(r"\d+(-\d+)?(%\d+)?", options.array):
        raise UserError(f"--array {options.array}: give a range such as 0-7, or 0-7%2.")


def array_bounds(array: str) -> tuple[int, int]:
    """First and last index of `0-7%2`."""
    first, _, last = array.partition("%")[0].partition("-")
    return int(first), int(last or first)
