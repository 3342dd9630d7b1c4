"""Worker of the export tests: two updates of every case, so that there are real checkpoints to read."""

import sys
from pathlib import Path

from pal_ds.config.recipe import load_recipe
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import leave
from pal_ds.engine.process_group import distributed
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.launch import write_base_weights
from tests.export.cases import CASES
from tests.one_training import train


def main(root: Path, names: list[str]) -> None:
    """Trains the cases of these names, or all of them."""
    with distributed() as world:
        for case in CASES:
            if names and case.name not in names:
                continue
            run = RunDirectory(root / case.name)
            config = load_recipe(run.config_file)
            data = PreparedData.open(config.data.path)
            world.from_rank_zero(lambda: write_base_weights(config, data, run))  # noqa: B023
            train(config, run, data, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    leave(0)
