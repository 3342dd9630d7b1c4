"""Worker of test_parity: runs many engine variants on the same updates and stores what they computed."""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pal_ds.backbones.config import BackboneConfig, LoraOptions
from pal_ds.config.run_config import OptimConfig, RunConfig, TrainConfig
from pal_ds.data.plan import split_update
from pal_ds.data.prepare import DataConfig
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import leave
from pal_ds.engine.process_group import distributed
from pal_ds.heads import PalA
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UsersConfig
from tests.one_training import begin

NUM_UPDATES = 20
# [micro-step][rank] sizes of a full update of 16 pairs: unequal everywhere.
SIZES = {(1, 1): [[16]], (1, 2): [[11], [5]], (2, 1): [[6, 10]], (2, 2): [[3, 5], [5, 3]]}


def recipe(data: str, base: str, tuning: str, stage: int) -> RunConfig:
    """Two learning rates (so two parameter groups), clipping on, eps large enough that Adam hides no scale error.

    Batches are packed, as by default for this family, and ZeRO-3 computes activations again.
    """
    return RunConfig(
        data=DataConfig(path=data, source=None),
        # Without kinks: at one, a rounding decides about a gradient.
        head=lambda hidden_size: PalA(
            hidden_size, num_prototypes=3, prototype_std=1.5, activation="gelu"
        ),
        backbone=BackboneConfig(
            path=base,
            tuning=tuning,
            lora=LoraOptions(rank=4),
            gradient_checkpointing=stage == 3,
        ),
        users=UsersConfig(learning_rate=0.5, epsilon=1e-2),
        optim=OptimConfig(
            learning_rate=3e-3, backbone_learning_rate=1e-3, epsilon=1e-4, warmup_fraction=0.1
        ),
        train=TrainConfig(
            batch_pairs=16,
            micro_batch_pairs=16,
            epochs=7,
            gradient_clipping=0.5,
            ds_config=f"tests/ds/zero{stage}.json",
        ),
    )


def split(num_pairs: int, world_size: int, accumulation: int) -> list[list[np.ndarray]]:
    sizes = SIZES[world_size, accumulation]
    if num_pairs != 16:
        return split_update(num_pairs, world_size, -(-num_pairs // (world_size * accumulation)))
    bounds = np.concatenate([[0], np.cumsum(np.ravel(sizes))])
    runs = [np.arange(a, b) for a, b in itertools.pairwise(bounds)]
    return [runs[step * world_size : (step + 1) * world_size] for step in range(len(sizes))]


def run_variant(config: RunConfig, accumulation: int, folder: Path, world) -> dict[str, np.ndarray]:
    state = begin(config, RunDirectory(folder), PreparedData.open(config.data.path), world)
    stepper = replace(state.stepper, num_updates=NUM_UPDATES, seed=0, needs_users=True)
    losses, norms, gathered, user_sums = [], [], [], []
    gather = stepper.user_gradients
    stepper.user_gradients = lambda *args: gathered.append(gather(*args)) or gathered[-1]
    for update in range(NUM_UPDATES):
        state.step = update
        epoch, index = divmod(update, state.plan.updates_per_epoch)
        rows = state.plan.update(epoch, index)
        runs = split(len(rows), world.world_size, accumulation)
        users = state.collator.user_rows(rows)
        batches = [state.inputs.batch(update, rows, users, step[world.rank]) for step in runs]
        stats = stepper.run(update, batches, runs, users)
        user_sums.append(
            torch.zeros(3, 3).index_add_(
                0, torch.from_numpy(state.collator.user_rows(rows)), gathered[-1]
            )
        )
        losses.append(world.sum(stats.loss_sum).item() / stats.num_pairs)
        norms.append(float(stats.grad_norm))
    state.engine.destroy()
    return {
        "loss": np.array(losses),
        "norm": np.array(norms),
        "users": state.users.logits.numpy(),
        "user_gradients": torch.stack(user_sums).numpy(),
    }


def main(data: str, base: str, out: str) -> None:
    with distributed() as world:
        for tuning in ("full", "lora", "frozen"):
            for stage in range(4):
                for accumulation in (1, 2):
                    config = recipe(data, base, tuning, stage)
                    result = run_variant(config, accumulation, Path(out) / "run", world)
                    name = f"{tuning}_zero{stage}_world{world.world_size}_accumulation{accumulation}.npz"
                    if world.is_rank_zero:
                        np.savez(Path(out) / name, **result)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave(0)
