"""What the ranks of test_reshard do with one small module under every stage; and how they tell what an engine holds."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
)
from safetensors.torch import save_file
from torch import nn

from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.checkpoint import load_checkpoint, save_checkpoint
from pal_ds.engine.checkpoint.resharder import Resharder
from pal_ds.engine.checkpoint.shard_reader import MOMENTS
from pal_ds.engine.checkpoint.verify import verify_checkpoint
from pal_ds.errors import UserError
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable
from tests.engine.checkpoint.shards_worker import Tangle

STOP = 4
VARIANTS: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0},
    "zero0_bf16": {"stage": 0, "bf16": True},
    "zero1": {"stage": 1},
    "zero1_fp32_sums": {"stage": 1, "bf16": True, "sums": "fp32"},
    "zero2_bf16": {"stage": 2, "bf16": True},
    "zero2_dealt": {"stage": 2, "round_robin_gradients": True},
    "zero2_aligned": {"stage": 2, "bf16": True, "parameter_alignment": True},
    "zero3": {"stage": 3},
    "zero3_small": {"stage": 3, "sub_group_size": 12},
    "zero3_bf16": {"stage": 3, "bf16": True, "sub_group_size": 30},
    "zero3_offload": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "sub_group_size": 12},
}
CHANGES = (
    ("zero3_small", "zero2_dealt"),
    ("zero2_dealt", "zero3"),
    ("zero3", "zero3_offload"),
    ("zero3_offload", "zero1"),
    ("zero3", "zero3_bf16"),
    ("zero3", "zero3_small"),
)
"""Other stages, offload, precision and sub-groups on the same two ranks."""


VECTORS = (
    "fp32_partitioned_groups_flat",  # stage 3
    "single_partition_of_fp32_groups",  # stages 1 and 2
    "fp32_groups_flat_partition",  # stage 1 in bf16 with sums in fp32
)


def vectors_of(engine: Any) -> list[torch.Tensor]:
    return next(
        (getattr(engine.optimizer, name) for name in VECTORS if hasattr(engine.optimizer, name)), []
    )


def steps_of(engine: Any) -> dict[str, torch.Tensor]:
    """The distinct step counts of each parameter group's vectors."""
    zero, vectors = engine.optimizer, vectors_of(engine)
    groups = getattr(zero, "sub_group_to_group_id", {i: i for i in range(len(vectors))})
    counts: dict[int, set[float]] = {}
    for index, vector in enumerate(vectors):
        counts.setdefault(groups[index], set()).add(float(zero.optimizer.state[vector]["step"]))
    return {f"step.{group}": torch.tensor(sorted(found)) for group, found in counts.items()}


def held_dealt(engine: Any, world: World) -> dict[str, torch.Tensor]:
    """Masters and moments under round_robin_gradients: there DeepSpeed's accessors take one parameter for another."""
    zero, found = engine.optimizer, {}
    for members, vector in zip(zero.round_robin_bit16_groups, vectors_of(engine), strict=True):
        for kind in ("master", *MOMENTS):
            mine = vector.detach() if kind == "master" else zero.optimizer.state[vector][kind]
            whole = world.all_gather(mine).flatten()
            for parameter in members:
                name = engine.param_names[parameter]
                found[f"{kind}.{name}"] = whole[: parameter.numel()].view(parameter.shape)
                whole = whole[parameter.numel() :]
                # In fp32 the weights themselves say whether this is right.
                assert kind != "master" or torch.equal(found[f"{kind}.{name}"], parameter.detach())
    return found


def held(engine: Any, users: UserTable, world: World) -> dict[str, torch.Tensor]:
    """Everything by name, whole, as DeepSpeed's own accessors gather it; buffers of all ranks, stacked."""
    zero = engine.optimizer
    dealt = getattr(zero, "round_robin_gradients", False)
    if engine.zero_optimization_stage() in (1, 2) and not dealt:
        # DeepSpeed links the moments to the parameters in the first update, which has not been made after loading.
        members = getattr(zero, "bf16_groups", None) or zero.bit16_groups
        for group, vector in zip(members, vectors_of(engine), strict=True):
            lazy_init_hp_params_optimizer_state(group, vector, zero.optimizer.state)
    found = held_dealt(engine, world) if dealt else {}
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad or dealt:
            continue
        if engine.zero_optimization():
            found[f"master.{name}"] = safe_get_full_fp32_param(parameter)
            for key in MOMENTS:
                found[f"{key}.{name}"] = safe_get_full_optimizer_state(parameter, key)
        else:
            found[f"master.{name}"] = parameter.detach()
    for name, buffer in engine.module.named_buffers():
        found[f"buffer.{name}"] = world.all_gather(buffer)
    for key, tensor in users.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            found[f"users.{key}"] = tensor
    return {key: value.detach().cpu().clone() for key, value in (found | steps_of(engine)).items()}


def leave_behind(path: Path, found: dict[str, torch.Tensor], world: World) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if world.is_rank_zero:
        save_file(found, path)
    world.barrier()


def save_again(engine: Any, users: UserTable, folder: Path, world: World) -> None:
    facts = {"dataset_hash": "", "num_updates": 0}
    save_checkpoint(engine, users, RunDirectory(folder / "again"), STOP, world, facts)


class Knot(Tangle):
    """A tied, a frozen and a buffered module with another buffer on each rank."""

    def __init__(self, rank: int, width: int = 7) -> None:
        super().__init__()
        self.running += rank
        if width != 7:
            self.second = nn.Linear(5, width)


def start_engine(variant: str, rank: int, width: int = 7) -> Any:
    torch.manual_seed(0)
    options = dict(VARIANTS[variant])
    bf16, sums = options.pop("bf16", False), options.pop("sums", None)
    model = Knot(rank, width)
    groups = [
        {"params": [model.second.weight, model.scale], "lr": 0.02, "name": "a"},
        {"params": [model.first.weight, model.first.bias, model.second.bias], "name": "b"},
    ]
    settings = {"lr": 0.01, "eps": 1e-4}
    if "offload_optimizer" in options:
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, **settings)
    if options["stage"] == 3:
        options["stage3_param_persistence_threshold"] = 0
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"overlap_comm": False, **options},
        "gradient_clipping": 0.0,
        "bf16": {"enabled": bf16},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        **({"data_types": {"grad_accum_dtype": sums}} if sums else {}),
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def updates(engine: Any, num_updates: int) -> list[float]:
    """Losses of updates in which all ranks see the same, so that their number does not matter."""
    losses = []
    dtype = torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    for _ in range(num_updates):
        seen = torch.linspace(-1, 1, 14, dtype=dtype).view(2, 7) * (1 + engine.global_steps)
        loss = engine(seen)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def count_apart(engine: Any) -> None:
    """The second group has made five updates more than the first: a count taken from another group would show."""
    zero = engine.optimizer
    groups = getattr(zero, "sub_group_to_group_id", {0: 0, 1: 1})
    for index, vector in enumerate(vectors_of(engine)):
        zero.optimizer.state[vector]["step"] += 5 * groups[index]


def knots_begin(world: World, out: Path) -> None:
    """Each variant trained a little and saved, then trained on where it is."""
    for name in VARIANTS:
        engine = start_engine(name, world.rank)
        updates(engine, 3)
        if engine.zero_optimization():
            count_apart(engine)
        users = UserTable(2, ["ann", "bo"])
        folder = out / name
        leave_behind(folder / "held.safetensors", held(engine, users, world), world)
        save_checkpoint(
            engine, users, RunDirectory(folder), STOP, world, {"dataset_hash": "", "num_updates": 0}
        )
        losses = updates(engine, 10)
        if world.is_rank_zero:
            (folder / "losses.json").write_text(json.dumps(losses))
        engine.destroy()


def load(
    source: str, target: str, world: World, out: Path, width: int = 7
) -> tuple[Any, UserTable]:
    engine = start_engine(target, world.rank, width)
    users = UserTable(2, ["ann", "bo"])
    path = RunDirectory(out / source).checkpoint(STOP)
    load_checkpoint(engine, users, path, verify_checkpoint(path), world)
    return engine, users


def knot_goes_on(source: str, target: str, world: World, out: Path) -> None:
    engine, users = load(source, target, world, out)
    folder = out / f"{source}_as_{target}_{world.world_size}"
    leave_behind(folder / "held.safetensors", held(engine, users, world), world)
    save_again(engine, users, folder, world)
    losses = updates(engine, 10)
    leave_behind(folder / "after.safetensors", steps_of(engine), world)
    if world.is_rank_zero:
        (folder / "losses.json").write_text(json.dumps(losses))
    engine.destroy()


def refusals(world: World, out: Path) -> None:
    """What every rank is told where the shards cannot become those of this launch, or one rank cannot read them."""
    told = {}
    for name, target, width in (("stage", "zero0", 7), ("model", "zero3", 9)):
        try:
            load("zero2_dealt", target, world, out, width)
        except UserError as error:
            told[name] = f"{type(error).__name__}: {error}"
    broken = mock.patch.object(Resharder, "optimizer_states", side_effect=OSError(5, "broken"))
    with broken if world.rank == 1 else mock.patch.dict({}):
        try:
            load("zero3", "zero3", world, out)
        except UserError as error:
            told["disk"] = f"{type(error).__name__}: {error}"
    (out / f"refusals_{world.rank}.json").write_text(json.dumps(told))
