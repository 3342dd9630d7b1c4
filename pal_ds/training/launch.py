"""The frame of a training: data prepared, run directory checked, processes joined and left."""

import contextlib
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pal_ds.config.changes import refuse_changes
from pal_ds.config.own_code import refuse_changed_code
from pal_ds.config.run_config import RunConfig
from pal_ds.data.collator import Collator
from pal_ds.data.prepare import prepare
from pal_ds.data.tables import PreparedData
from pal_ds.distributed import phase
from pal_ds.distributed.watchdog import meeting, watch
from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.checkpoint import refuse_other_launch
from pal_ds.engine.checkpoint.manifest import read_manifest
from pal_ds.engine.checkpoint.verify import refuse_strangers_run
from pal_ds.engine.ds_config import DeepSpeedConfig, check_zero_section, ds_config_of
from pal_ds.engine.process_group import distributed
from pal_ds.errors import LauncherError, UnfinishedError, UserError, mendable, writing
from pal_ds.io.files import new_folder, write_json
from pal_ds.modeling.build import Parts, RunContext, assemble
from pal_ds.modeling.lengths import data_to_prepare
from pal_ds.runs.lock import LOCK, only_writer
from pal_ds.runs.run_dir import RunDirectory, RunState
from pal_ds.training.agreement import agree_on_data, agree_on_start

logger = logging.getLogger(__name__)

OUR_BASE = "random_weights.json"
"""Marks a base folder as random weights of ours, which may be written again."""


@dataclass(frozen=True)
class TrainingRequest:
    """The request for a training, checked as far as that needs no data."""

    config: RunConfig
    recipe: str
    """The resolved YAML, which becomes the run's config.yaml."""
    run: RunDirectory
    ds_config: DeepSpeedConfig
    """DeepSpeed's JSON for this recipe and world size."""
    fresh: bool = False
    """Refuse a directory that is not empty."""
    allow_change: Sequence[str] = ()
    """Keys that may differ on resume."""
    trust_checkpoint: bool = False
    """Read runs and exports of another owner."""
    trust_code: bool = False
    """Import the classes that the run of `train.init_from` names beyond pal_ds's own."""


def world_size_of_launch() -> int:
    """Return the number of ranks that the launcher starts, before they have met; 1 without a launcher."""
    world_size = os.environ.get("WORLD_SIZE", "1")
    if not world_size.isdecimal() or int(world_size) < 1:
        raise LauncherError(f"WORLD_SIZE is {world_size!r} in the environment, no number of ranks.")
    return int(world_size)


def launch_training(
    config: RunConfig,
    recipe: str,
    run_dir: Path,
    *,
    fresh: bool = False,
    allow_change: Sequence[str] = (),
    trust_checkpoint: bool = False,
    trust_code: bool = False,
) -> None:
    """Prepare the data where this launch is a single node, then train; all else is as in `TrainingRequest`.

    Raises:
        UserError: the recipe contradicts itself, the data or the run that is to be resumed.
    """
    world_size = world_size_of_launch()
    request = TrainingRequest(
        config=config,
        recipe=recipe,
        run=RunDirectory(run_dir),
        # What needs no data is refused before an hour of tokenising, by every rank alike.
        ds_config=ds_config_of(config.train, world_size),
        fresh=fresh,
        allow_change=allow_change,
        trust_checkpoint=trust_checkpoint,
        trust_code=trust_code,
    )
    with joined_with_data(config) as (world, tables):
        train_among(world, request, tables)


def train_among(
    world: World,
    request: TrainingRequest,
    tables: Callable[[], PreparedData],
    *,
    encoded: Collator | None = None,
) -> Collator | None:
    """Make one training of ranks that have met; `tables` opens the data, `encoded` and the result are `train`'s."""
    config, run = request.config, request.run
    with contextlib.ExitStack() as held:
        from pal_ds.engine.checkpoint.forget import recover
        from pal_ds.training.loop import train

        # First of all: what differs here would train other weights in silence, or wait for a collective for ever.
        names = ("fresh", "allow_change", "trust_checkpoint", "trust_code")
        cli: dict[str, object] = {f"--{name}": getattr(request, name) for name in names}
        cli["--run_dir"] = str(run.path.absolute())
        agree_on_start(world, request.recipe, request.ds_config, cli)
        check_zero_section(request.ds_config, config.train.ds_config)
        with meeting():
            world.from_rank_zero(lambda: held.enter_context(only_writer(run)))
        # Not before: the watchdog writes into the run, which until now may be another's.
        record = functools.partial(record_end, run, "failed")
        held.enter_context(watch(world, run.path / "stacks", config.train.hang_minutes, record))
        world.from_rank_zero(run.discard_temporaries)
        # A removal of a user that was cut off leaves a checkpoint under another name.
        world.from_rank_zero(lambda: recover(run))
        try:
            data = world.on_every_rank(tables)
        except UnfinishedError:
            world.from_rank_zero(lambda: record_end(run, "stopped", "signal"))
            raise
        agree_on_data(world, data)
        context = RunContext(
            config=config, run=run, data=data, world=world, ds_config=request.ds_config
        )
        world.from_rank_zero(lambda: check_run_directory(request, data))
        written: list[Path] = []
        try:
            return train(
                context,
                _assemble(context, written, request),
                encoded=encoded,
                trust_checkpoint=request.trust_checkpoint,
                recipe=request.recipe,
            )
        except UserError:
            if world.is_rank_zero and not run.config_file.is_file():
                # A start that never came to its first update leaves no trace.
                for folder in written:
                    shutil.rmtree(folder, ignore_errors=True)
            raise


def _assemble(context: RunContext, written: list[Path], request: TrainingRequest) -> Parts:
    """Assemble the parts once, and write the weights that no path gives into folders that join `written`.

    Raises:
        UserError: on every rank, where the recipe does not fit the data or the weights cannot be written.
    """
    config, data, run, world = context.config, context.data, context.run, context.world
    taken: Parts | None = None

    def take() -> None:
        nonlocal taken
        from pal_ds.training.init_from.copy import take_over

        leave = {"trust": request.trust_checkpoint, "trust_code": request.trust_code}
        taken = take_over(config, data, run, **leave)
        written.extend([] if taken is None else [run.init])

    def write_base() -> None:
        written.extend([run.base] if write_base_weights(config, data, run) else [])

    if config.train.init_from is not None:
        world.from_rank_zero(take)
    parts = world.on_every_rank(lambda: assemble(config, data, run) if taken is None else taken)
    if world.is_rank_zero and "logits" in parts.head.needs and len(data.users) == 1:
        logger.warning(
            "all comparisons are of one user, %s: a head with a point per user has nobody to tell apart. Records name "
            "their user by `user_id`.",
            data.users[0],
        )
    if config.backbone.architecture is not None and data.info["kind"] == "tokens":
        world.from_rank_zero(write_base)
    return parts


def record_end(run: RunDirectory, state: RunState, reason: str) -> None:
    """Write status.json of a run that ends outside of its loop; nothing where none had begun."""
    facts = run.status()
    if facts is not None:
        step = phase.current().step or facts["step"]
        run.write_status({**facts, "state": state, "step": step, "reason": reason})


@contextlib.contextmanager
def joined_with_data(
    config: RunConfig, needs: str = "", others: Sequence[RunConfig] = ()
) -> Iterator[tuple[World, Callable[[], PreparedData]]]:
    """Prepare the data where this launch is a single node, then join the ranks; yields them and what opens the data.

    The data of `others` are prepared, too. `needs` says what else to get, where preparing fails. Alone, that is raised
    before DeepSpeed is loaded.
    """
    failures: list[UserError] = []

    def make() -> None:
        failure = next(filter(None, map(prepare_before_processes_meet, (config, *others))), None)
        if failure is not None:
            failures.append(type(failure)(f"{failure}{needs}") if needs else failure)

    if alone := world_size_of_launch() == 1:
        make()
        if failures:
            raise failures[0]
    limits = {"hang_minutes": config.train.hang_minutes, "first": (lambda: None) if alone else make}
    with distributed(config.train.timeout_minutes, **limits) as world:
        yield world, lambda: open_data(config, failures[0] if failures else None)


def prepare_before_processes_meet(config: RunConfig) -> UserError | None:
    """Prepare on rank 0 of a single node before the others join: tokenising inside a process group times out.

    What goes wrong is returned, not raised, so that the others learn of it once they have met.
    """
    world_size = str(world_size_of_launch())
    # torchrun sets the first, the deepspeed launcher the second; a plain launch sets neither.
    local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size))
    if os.environ.get("RANK", "0") != "0":
        return None
    if world_size != local and not Path(config.data.path, "dataset.json").is_file():
        return UserError(
            f"{config.data.path}: not prepared, and this launch spans nodes ({world_size} ranks, {local} here). "
            "Run `pal-ds prepare --config RECIPE` once first."
        )
    try:
        with writing(config.data.path):
            prepare(data_to_prepare(config))
    except UserError as error:
        return mendable(error)
    return None


def open_data(config: RunConfig, failure: UserError | None) -> PreparedData:
    """Open the prepared tables. Raises the failure of preparing them, if there was one."""
    if failure is not None:
        raise failure
    return PreparedData.open(config.data.path)


def check_run_directory(request: TrainingRequest, data: PreparedData) -> None:
    """Check, writing nothing, that a run may start here or is the one that is to be resumed.

    Raises:
        UserError: `fresh` meets a directory that is not empty; a resumed run would have other data or another
            value of a key that alters the result; or others may have written it. Another number of ranks is fine.
    """
    run = request.run
    if request.fresh and any(path.name not in (LOCK, "slurm") for path in run.path.iterdir()):
        raise UserError(
            f"{run.path}: --fresh needs an empty directory. Name another --run_dir or empty this one."
        )
    if run.config_file.is_file() and run.has_checkpoints():
        if not request.trust_checkpoint:
            refuse_strangers_run(run)
        refuse_changes(run.config_file, request.recipe, list(request.allow_change))
        refuse_changed_code(request.recipe, run.path, list(request.allow_change))
    for step in run.complete_steps()[-1:]:
        path = run.checkpoint(step)
        try:
            manifest = read_manifest(path)
        except UserError:
            continue  # resuming passes it over, by name, and asks again of the one that it takes
        refuse_other_launch(path, manifest, data.hash, data.path)


def write_base_weights(config: RunConfig, data: PreparedData, run: RunDirectory) -> bool:
    """Write random weights of `backbone.architecture`, anew until a checkpoint stands on them; return True if written.

    Raises:
        UserError: a folder of that name holds something that we did not write.
    """
    from pal_ds.backbones.transformer import materialise_architecture

    ours = run.base / OUR_BASE
    if run.base.exists() and not ours.is_file():
        raise UserError(
            f"{run.base}: holds something that pal_ds did not write, and random weights of backbone.architecture "
            "would go there. Name another --run_dir, or set backbone.path to use these weights."
        )
    if run.has_checkpoints() and ours.is_file():
        return False
    # Of an earlier start that never came to a checkpoint.
    shutil.rmtree(run.base, ignore_errors=True)
    # Half a folder, or one without its mark, could not be told from somebody else's.
    with new_folder(run.base) as folder:
        vocab_size = data.info["tokens"]["vocab_size"]
        seed, language = config.train.seed, config.loss.lm_weight > 0
        materialise_architecture(config.backbone, vocab_size, seed, folder, language=language)
        write_json(folder / OUR_BASE, {"architecture": config.backbone.architecture, "seed": seed})
    return True
