"""Worker of test_launch: the same ten updates under every setting that should not change them much."""

import sys
from dataclasses import replace
from pathlib import Path

from pal_ds.config.recipe import recipe_from_arguments
from pal_ds.config.run_config import RunConfig
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import leave
from pal_ds.engine.process_group import distributed
from pal_ds.runs.run_dir import RunDirectory
from tests.one_training import train

VARIANTS = {
    "plain": [],
    "offload": ["--train.ds_config=zero3_cpu_offload"],
    "bf16": ["--train.precision=bf16"],
    "checkpointing": ["--backbone.gradient_checkpointing=true"],
    "token_budget": ["--train.micro_batch_tokens=80"],
    "workers": ["--train.num_workers=1"],
    "gumbel": ["--head.mixture=gumbel", "--head.temperature=8.0"],
    "gumbel_again": [
        "--head.mixture=gumbel",
        "--head.temperature=8.0",
        "--train.micro_batch_pairs=2",
    ],
}


def main(recipe: str, out: str) -> None:
    with distributed() as world:
        for name, options in VARIANTS.items():
            config: RunConfig = recipe_from_arguments([f"--config={recipe}", *options])
            config = replace(config, data=replace(config.data, source=None))
            data = PreparedData.open(config.data.path)
            train(config, RunDirectory(Path(out) / name), data, world)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
