"""What happens around a training: data prepared, run directory checked, processes joined and left."""

import os
from pathlib import Path

from pal_ds.config import RunConfig
from pal_ds.data.prepare import prepare
from pal_ds.data.tables import PreparedData
from pal_ds.engine.dist import distributed
from pal_ds.errors import UserError
from pal_ds.recipe import refuse_changes
from pal_ds.run_dir import RunDirectory, write_atomically


def launch_training(
    config: RunConfig,
    recipe: str,
    run_dir: Path,
    *,
    fresh: bool = False,
    allow_change: list[str] | None = None,
    trust_checkpoint: bool = False,
) -> None:
    """`train`: prepares data on a single node, then trains; `recipe` is the resolved YAML."""
    run = RunDirectory(run_dir)
    prepare_before_processes_meet(config)
    with distributed(config.train.timeout_minutes) as world:
        from pal_ds.train import train

        world.from_rank_zero(
            lambda: claim_run_directory(run, recipe, fresh=fresh, allow_change=allow_change or [])
        )
        data = PreparedData.open(config.data.path)
        if config.backbone.architecture is not None and data.info["kind"] == "tokens":
            world.from_rank_zero(lambda: write_base_weights(config, data, run))
        train(config, run, data, world, trust_checkpoint=trust_checkpoint)


def prepare_before_processes_meet(config: RunConfig) -> None:
    """Rank 0 of a single node prepares while the others wait to join: tokenising inside a process group times out."""
    if Path(config.data.path, "dataset.json").is_file() and config.data.source is None:
        return
    world_size, local = (os.environ.get(name, "1") for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if os.environ.get("RANK", "0") != "0":
        return
    if (
        world_size != os.environ.get("LOCAL_WORLD_SIZE", world_size)
        and not Path(config.data.path, "dataset.json").is_file()
    ):
        raise UserError(
            f"{config.data.path}: not prepared, and this launch spans nodes ({world_size} ranks, {local} here). "
            "Run `pal-ds prepare --config RECIPE` once first."
        )
    prepare(config.data)


def claim_run_directory(
    run: RunDirectory, recipe: str, *, fresh: bool, allow_change: list[str]
) -> None:
    """Writes config.yaml into a new run, or checks that a resumed one is the same run.

    Raises:
        UserError: `fresh` meets a directory that is not empty, or a key that alters the result has changed.
    """
    if fresh and run.path.exists() and any(run.path.iterdir()):
        raise UserError(
            f"{run.path}: --fresh needs an empty directory. Name another --run_dir or empty this one."
        )
    if run.config_file.is_file() and run.has_checkpoints():
        refuse_changes(run.config_file, recipe, allow_change)
    run.checkpoints.mkdir(parents=True, exist_ok=True)
    write_atomically(run.config_file, recipe)


def write_base_weights(config: RunConfig, data: PreparedData, run: RunDirectory) -> None:
    """Writes the random weights of `backbone.architecture` into the run, once."""
    from pal_ds.backbones.transformer import materialise_architecture

    if not (run.base / "config.json").is_file():
        materialise_architecture(
            config.backbone, data.info["tokens"]["vocab_size"], config.train.seed, run.base
        )
