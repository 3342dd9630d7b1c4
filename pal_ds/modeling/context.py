"""The context of a training: recipe, run directory, data, ranks and DeepSpeed's settings."""

from dataclasses import dataclass

from pal_ds.config.run_config import RunConfig
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.engine.ds_config import DeepSpeedConfig, ds_config_of
from pal_ds.runs.run_dir import RunDirectory


@dataclass(frozen=True)
class RunContext:
    """The fixed surroundings of a training; nothing in it changes while the training goes on."""

    config: RunConfig
    run: RunDirectory
    data: PreparedData
    world: World
    ds_config: DeepSpeedConfig
    """DeepSpeed's JSON for this recipe and world size."""

    @staticmethod
    def of(config: RunConfig, run: RunDirectory, data: PreparedData, world: World) -> "RunContext":
        """Return the context with the DeepSpeed settings that the recipe asks for.

        Raises:
            UserError: the recipe and its DeepSpeed JSON contradict each other.
        """
        ds_config = ds_config_of(config.train, world.world_size)
        return RunContext(config=config, run=run, data=data, world=world, ds_config=ds_config)
