"""Worker of test_resume: each recipe once without a break, and once stopped after update k and started again."""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from pal_ds.backbones.config import BackboneConfig, LoraOptions
from pal_ds.config.run_config import OptimConfig, RunConfig, TrainConfig
from pal_ds.data.prepare import DataConfig
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import leave
from pal_ds.engine.process_group import distributed
from pal_ds.heads import PalA
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training import loop
from pal_ds.users import UsersConfig
from tests.one_training import train

# About 50 training pairs in updates of 16: four updates an epoch, the last a short one.
STOPS = {"full": (3, 4, 6), "lora": (5,), "frozen": (4,)}
NUM_UPDATES = 8


def recipe(
    data: str,
    base: str,
    tuning: str,
    *,
    dropout: float = 0.1,
    mixture: str = "gumbel",
    prior: str = "learnt",
) -> RunConfig:
    """Dropout in backbone and head, Gumbel noise, reliability and a prior: a state that was lost would show."""
    return RunConfig(
        data=DataConfig(path=data, source=None),
        head=lambda hidden_size: PalA(
            hidden_size, num_prototypes=3, dropout=dropout, mixture=mixture
        ),
        users=UsersConfig(prior=prior, reliability="learnt"),
        backbone=BackboneConfig(path=base, tuning=tuning, lora=LoraOptions(rank=4, dropout=0.1)),
        optim=OptimConfig(learning_rate=3e-3, backbone_learning_rate=1e-3),
        train=TrainConfig(
            epochs=2,
            batch_pairs=16,
            micro_batch_pairs=4,
            ds_config="tests/ds/zero3.json",
            log_every=1,
            save_every=3,
        ),
    )


def main(data_path: str, base: str, out: str) -> None:
    # The prior changes between a checkpoint and the next, and before and after it.
    loop.LEARN_EVERY = 3
    data = PreparedData.open(data_path)
    with distributed() as world:

        def run_once(config: RunConfig, folder: Path) -> None:
            train(config, RunDirectory(folder), data, world)

        run_once(recipe(data_path, base, "full", dropout=0.0), Path(out) / "full_no_dropout")
        run_once(recipe(data_path, base, "full", mixture="softmax"), Path(out) / "full_no_gumbel")
        run_once(recipe(data_path, base, "full", prior="none"), Path(out) / "full_no_prior")
        for tuning, stops in STOPS.items():
            config = recipe(data_path, base, tuning)
            run_once(config, Path(out) / f"{tuning}_whole")
            for stop in stops:
                folder = Path(out) / f"{tuning}_stopped_{stop}"
                run_once(replace(config, train=replace(config.train, stop_after=stop)), folder)
                world.barrier()
                if world.is_rank_zero and stop == 6:
                    # The newest checkpoint is damaged: the run must go on from the one before.
                    shard = next(
                        (folder / "checkpoints" / "step_00000006" / "engine").glob(
                            "*optim_states.pt"
                        )
                    )
                    shutil.copy(shard, folder / "intact.pt")
                    content = bytearray(shard.read_bytes())
                    content[len(content) // 2] ^= 1
                    shard.write_bytes(content)
                world.barrier()
                run_once(config, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
