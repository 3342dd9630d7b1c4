"""DeepSpeed's engine: all that loop, step and checkpoints ask of it, and how it is started around a model."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from pal_ds.config.run_config import OptimConfig
from pal_ds.data.batch import Batch
from pal_ds.distributed.room import refuse_too_little_room
from pal_ds.engine.ds_config import DeepSpeedConfig, offloads_optimizer, zero_stage
from pal_ds.engine.guard import UpdateGuard
from pal_ds.engine.optim import ParamGroup, build_optimizer, parameter_groups
from pal_ds.heads.base import HeadOutput, PairLoss, UserState


class EngineOptimizer(Protocol):
    """DeepSpeed's wrapper around the optimizer."""

    param_groups: list[ParamGroup]
    _global_grad_norm: float | Tensor | None
    """The norm over all ranks of the update at hand; missing at stage 0 in fp32."""


class TrainingEngine(Protocol):
    """A DeepSpeed engine around a `RewardModel`; all ranks call the same methods in the same order."""

    config: DeepSpeedConfig
    module: nn.Module
    optimizer: EngineOptimizer
    checkpoint_engine: object
    """Writes and reads shards: an `engine.checkpoint.shard_writer.ShardFiles`."""
    _copy_recovery_script: Callable[[str], None]
    _get_all_ckpt_names: Callable[..., list[str]]

    def __call__(
        self, batch: Batch, user: UserState, pair_loss: PairLoss | None = None, /
    ) -> HeadOutput: ...
    def train(self) -> object: ...
    def eval(self) -> object: ...
    def set_gradient_accumulation_boundary(self, is_boundary: bool, /) -> None: ...
    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> object: ...
    def step(self) -> None: ...
    def was_step_applied(self) -> bool: ...
    def get_global_grad_norm(self) -> float | Tensor | None: ...
    def zero_optimization(self) -> bool: ...
    def bfloat16_enabled(self) -> bool: ...
    def save_checkpoint(
        self, save_dir: str, *, tag: str, save_latest: bool, exclude_frozen_parameters: bool
    ) -> object: ...
    def load_checkpoint(
        self, load_dir: str, *, tag: str, load_module_strict: bool
    ) -> tuple[str | None, object]: ...
    def _get_zero_param_shapes(self) -> Sequence[Mapping[str, Sequence[int]]]: ...
    def destroy(self) -> None: ...


@contextlib.contextmanager
def partitioned_loading(ds_config: DeepSpeedConfig) -> Iterator[None]:
    """Make `from_pretrained`, inside the block, partition weights as it reads them where the config is ZeRO-3.

    transformers keeps only a weak reference to the config object: if it died, every rank would silently build a
    whole model. Hence the local variable that outlives the block, and the explicit unset at its end.
    """
    if zero_stage(ds_config) < 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(ds_config)
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


def start_training_engine(
    model: nn.Module, config: OptimConfig, ds_config: DeepSpeedConfig, guard: UpdateGuard
) -> TrainingEngine:
    """Start DeepSpeed's engine around `model`; the step sets the learning rates, the guard may skip an update.

    Raises:
        UserError: there is no parameter to train.
        StorageError: this process cannot start the threads that it needs.
    """
    # DeepSpeed makes groups of its own, and the weights have taken their room by now.
    refuse_too_little_room()
    import deepspeed

    from pal_ds.engine.process_group import operators_have_a_place

    with operators_have_a_place():
        optimizer = build_optimizer(
            parameter_groups(model, config), config, offload=offloads_optimizer(ds_config)
        )
        guard.attach(optimizer)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config)
    return cast(TrainingEngine, engine)


def start_inference_engine(model: nn.Module, ds_config: DeepSpeedConfig) -> nn.Module:
    """Make `model` ready to be called under no_grad: partitioned at ZeRO-3, plain otherwise. All ranks call in step."""
    if zero_stage(ds_config) < 3:
        return model.to(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu"))
    import deepspeed

    config = {k: v for k, v in ds_config.items() if k not in ("optimizer", "scheduler")}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    return engine


def parameter_bytes_on_this_rank(model: nn.Module) -> tuple[int, int]:
    """Return (bytes of parameters on this rank, bytes of the whole model); under ZeRO-3 a rank holds partitions."""
    held = whole = 0
    for parameter in model.parameters():
        partition = getattr(parameter, "ds_tensor", parameter)
        held += partition.numel() * parameter.element_size()
        whole += getattr(parameter, "ds_numel", parameter.numel()) * parameter.element_size()
    return held, whole
