"""The protocol of DeepSpeed's training engine: all that the loop, the step and the checkpoint code ask of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, nn

from pal_ds.data.batch import Batch
from pal_ds.engine.ds_config import DeepSpeedConfig
from pal_ds.engine.optim import ParamGroup
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
