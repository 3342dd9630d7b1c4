"""Worker of test_reshard: checkpoints of 1, 2 and 4 ranks, read back and trained on by other numbers of ranks.

One process imports everything once and forks the ranks of each world size from itself: eleven ranks would else spend a
minute on imports. Each leaves what its engine held and the losses it saw; the comparisons are the test's.
"""

import functools
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import cpuinfo
import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
)
from safetensors.torch import save_file
from torch import nn

from pal_ds.backbones.config import BackboneConfig, LoraOptions
from pal_ds.config import OptimConfig, RunConfig, TrainConfig
from pal_ds.data.prepare import DataConfig
from pal_ds.data.tables import PreparedData
from pal_ds.engine.checkpoint import load_checkpoint, save_checkpoint, verify_checkpoint
from pal_ds.engine.dist import World, distributed, leave
from pal_ds.engine.resharder import Resharder
from pal_ds.engine.shards import MOMENTS
from pal_ds.errors import UserError
from pal_ds.heads import PalA
from pal_ds.run_dir import RunDirectory
from pal_ds.start import start_training
from pal_ds.train import run_updates
from pal_ds.users import UserTable
from tests.engine.shards_worker import Tangle

STOP, NUM_UPDATES = 4, 14
TUNINGS = ("full", "lora", "frozen", "tied")
TARGETS = {1: (2,), 2: (1, 3), 4: (2,)}
"""The world sizes that go on with a run of each world size."""
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


def recipe(data: str, base: str, tuning: str) -> RunConfig:
    """Two or three parameter groups, no dropout, no noise; `tied` gives a weight a second name and adds a buffer."""

    def head(hidden_size: int) -> PalA:
        made = PalA(hidden_size, num_prototypes=3)
        if tuning == "tied":
            made.alias = nn.Linear(hidden_size, hidden_size, bias=False)
            made.alias.weight = made.projector.layers[0].weight
            made.register_buffer("marks", torch.arange(3.0))
        return made

    kind = "full" if tuning == "tied" else tuning
    return RunConfig(
        data=DataConfig(path=data, source=None),
        head=head,
        backbone=BackboneConfig(path=base, tuning=kind, lora=LoraOptions(rank=4, dropout=0.0)),
        # A large epsilon: with the usual one Adam turns rounding of tiny gradients into visible steps.
        optim=OptimConfig(
            learning_rate=3e-3,
            backbone_learning_rate=1e-3,
            prototype_learning_rate=2e-3,
            epsilon=1e-4,
        ),
        train=TrainConfig(
            batch_pairs=8,
            micro_batch_pairs=4,
            epochs=2,
            ds_config="tests/ds/zero3.json",
            log_every=1,
            save_every=100,
        ),
    )


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


def copy(source: Path, target: Path, world: World) -> None:
    if world.is_rank_zero:
        shutil.copytree(source, target)
    world.barrier()


# Whole runs, through the recipe and the training loop


def runs_begin(world: World, data: str, base: str, out: Path) -> None:
    """A run stops, leaves its state and its copies for other worlds, and goes on where it is."""
    for tuning in TUNINGS:
        config = recipe(data, base, tuning)
        stopping = replace(config, train=replace(config.train, stop_after=STOP))
        folder = out / f"{tuning}_{world.world_size}"
        state = start_training(stopping, RunDirectory(folder), PreparedData.open(data), world)
        run_updates(state)
        leave_behind(folder / "held.safetensors", held(state.engine, state.users, world), world)
        state.engine.destroy()
        for target in TARGETS[world.world_size]:
            copy(folder, out / f"{tuning}_{world.world_size}_to_{target}", world)
        state = start_training(config, RunDirectory(folder), PreparedData.open(data), world)
        run_updates(state)
        state.engine.destroy()


def runs_go_on(world: World, data: str, base: str, out: Path) -> None:
    """What other worlds began: the state after loading, a checkpoint of it, and the rest of the run."""
    for source, targets in TARGETS.items():
        for tuning in TUNINGS if world.world_size in targets else ():
            config = recipe(data, base, tuning)
            folder = out / f"{tuning}_{source}_to_{world.world_size}"
            state = start_training(config, RunDirectory(folder), PreparedData.open(data), world)
            leave_behind(folder / "held.safetensors", held(state.engine, state.users, world), world)
            save_again(state.engine, state.users, folder, world)
            run_updates(state)
            leave_behind(folder / "after.safetensors", steps_of(state.engine), world)
            state.engine.destroy()


def save_again(engine: Any, users: UserTable, folder: Path, world: World) -> None:
    facts = {"dataset_hash": "", "num_updates": NUM_UPDATES}
    save_checkpoint(engine, users, RunDirectory(folder / "again"), STOP, world, facts)


# One small module under every stage


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


# Worlds


def in_world(world_size: int, data: str, base: str, out: Path) -> None:
    """All that a world of this size does, in this order of worlds: 4, 1, 2, 3, then 1 again."""
    with distributed() as world:
        began = (out / f"full_{world_size}").exists()
        if world_size in TARGETS and not began:
            runs_begin(world, data, base, out)
        if world_size == 2:
            knots_begin(world, out)
            for source, target in CHANGES:
                knot_goes_on(source, target, world, out)
        if world_size > 1 or began:
            runs_go_on(world, data, base, out)
        if world_size == 3 or began:
            for name in VARIANTS:
                knot_goes_on(name, name, world, out)
        if world_size == 3:
            refusals(world, out)


def rank_main(rank: int, world_size: int, port: int, *arguments: Any) -> None:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    here |= {"LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in here.items()})
    try:
        in_world(world_size, *arguments)
    except BaseException:
        import traceback

        print(f"[rank {rank} of {world_size}]\n{traceback.format_exc()}", file=sys.stderr)
        leave(1)
    leave(0)


def run_world(world_size: int, *arguments: Any) -> None:
    """Forks the ranks and waits for them; where one fails, the others end, too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    started = time.monotonic()
    ranks = [
        context.Process(target=rank_main, args=(rank, world_size, port, *arguments))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks):
        time.sleep(0.02)
        if any(rank.exitcode for rank in ranks):
            for rank in ranks:
                rank.terminate()
    print(f"{world_size} ranks: {time.monotonic() - started:.1f} s", flush=True)
    if any(rank.exitcode for rank in ranks):
        sys.exit(1)


LATE_IMPORTS = (
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "pal_ds.backbones.transformer",
    "peft",
    "setuptools",
    "torch._dynamo",
    "transformers.models.llama.modeling_llama",
)


def prepare_to_fork() -> None:
    """What each rank would else do again: late imports, and looking through all of them for garbage at every start."""
    for name in LATE_IMPORTS:
        importlib.import_module(name)
    # DeepSpeed's CPU Adam asks for the processor's maker, in a process of its own, each time.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    cpuinfo.get_cpu_info()
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    prepare_to_fork()
    for size in (4, 1, 2, 3, 1):
        run_world(size, sys.argv[1], sys.argv[2], Path(sys.argv[3]))
