"""Worker of test_families: five ZeRO-3 updates of every family and tuning, stopped after three and resumed."""

import sys
from pathlib import Path

from pal_ds.config.recipe import load_recipe
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import leave
from pal_ds.engine.process_group import distributed
from pal_ds.runs.run_dir import RunDirectory
from tests.backbones.families import FAMILIES, TUNINGS
from tests.one_training import train


def main(out: str) -> None:
    with distributed() as world:
        for family in FAMILIES:
            for tuning in TUNINGS:
                run = RunDirectory(Path(out) / f"{family}_{tuning}")
                config = load_recipe(run.config_file)
                data = PreparedData.open(config.data.path)
                first = load_recipe(run.path / "first.yaml")
                encoded = train(first, run, data, world)
                train(config, run, data, world, encoded=encoded if tuning == "frozen" else None)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
