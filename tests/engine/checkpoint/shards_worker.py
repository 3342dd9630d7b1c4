"""Worker of test_shards: one step per stage and precision, a checkpoint, and DeepSpeed's own reading of it."""

import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from safetensors.torch import save_file
from torch import nn

from pal_ds.distributed.world import leave
from pal_ds.engine.process_group import distributed


class Tangle(nn.Module):
    """Odd sizes, a tied matrix, a frozen one, a buffer, a scalar-like parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.frozen = nn.Linear(5, 5).requires_grad_(False)
        self.second = nn.Linear(5, 7)
        self.tied = nn.Linear(7, 5, bias=False)
        self.tied.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("running", torch.arange(3.0))
        self.register_buffer("count", torch.arange(2))

    def forward(self, x):
        x = self.second(self.frozen(self.first(x)))
        return (self.tied(x) * self.scale).square().mean()


def run(stage: int, precision: str, sub_group: int, out: Path, world) -> None:
    torch.manual_seed(0)
    model = Tangle()
    groups = [
        [model.second.weight],
        [model.first.weight, model.first.bias, model.second.bias, model.scale],
    ]
    optimizer = torch.optim.AdamW([{"params": g} for g in groups], lr=0.01)
    zero = {"stage": stage, "overlap_comm": False}
    if stage == 3:
        zero |= {"stage3_param_persistence_threshold": 0, "sub_group_size": sub_group}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    engine.backward(engine(torch.ones(2, 7, dtype=dtype) * (world.rank + 1)))
    engine.step()
    engine.save_checkpoint(
        str(out), tag="engine", save_latest=False, exclude_frozen_parameters=True
    )
    world.barrier()
    if world.is_rank_zero:
        if stage == 0:
            reference = {n: t for n, t in engine.module.state_dict().items() if "frozen" not in n}
        else:
            reference = get_fp32_state_dict_from_zero_checkpoint(
                str(out), tag="engine", exclude_frozen_parameters=True
            )
        save_file(
            {n: t.float().clone() for n, t in reference.items()}, str(out / "reference.safetensors")
        )
    world.barrier()
    engine.destroy()


def main(root: Path) -> None:
    with distributed() as world:
        for stage in range(4):
            for precision in ("fp32", "bf16"):
                for sub_group in (10**9, 40) if stage == 3 else (10**9,):
                    name = f"stage{stage}_{precision}_{sub_group}_world{world.world_size}"
                    run(stage, precision, sub_group, root / name, world)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
