"""The start of a training, on every rank: recipe, engine, code, libraries and prepared data are compared."""

from collections.abc import Mapping

import yaml

from pal_ds.config.own_code import own_code_hashes
from pal_ds.data.tables import PreparedData
from pal_ds.data.verification import verify_content
from pal_ds.distributed.agreement import installation_facts, refuse_disagreement
from pal_ds.distributed.world import World
from pal_ds.engine.ds_config import DeepSpeedConfig
from pal_ds.io.yaml_files import flattened


def agree_on_start(
    world: World,
    recipe: str,
    ds_config: DeepSpeedConfig,
    options: Mapping[str, object] | None = None,
) -> None:
    """Compare what ranks were started with: each key of the recipe (YAML), the engine's settings, code and libraries.

    Raises:
        DisagreementError: on every rank, where something differs; `options` are those of the command line.
    """
    facts = {
        **flattened(yaml.safe_load(recipe)),
        **flattened(ds_config, "DeepSpeed's configuration"),
        **installation_facts(),
        **flattened(world.on_every_rank(lambda: own_code_hashes(recipe)), "file of one's own"),
        "kind of device": world.device.type,
    }
    refuse_disagreement(world, {**facts, **(options or {})})


def agree_on_data(world: World, data: PreparedData) -> None:
    """Compare the prepared data of all ranks, and read every file of them once against its hash.

    Raises:
        DisagreementError: ranks have opened different data.
        UserError: a file is not the one that `prepare` wrote.
    """
    info = data.info
    facts = {"hash of data.path": data.hash, "checksum of dataset.json": info.get("checksum")}
    refuse_disagreement(world, facts)
    verify_content(data.path, info, world)
