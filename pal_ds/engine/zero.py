"""Starts DeepSpeed around a model: partitioned loading, the training engine, and inference for frozen backbones."""

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from torch import nn

from pal_ds.config.run_config import OptimConfig
from pal_ds.engine.ds_config import DeepSpeedConfig, offloads_optimizer, zero_stage
from pal_ds.engine.guard import UpdateGuard
from pal_ds.engine.optim import build_optimizer, parameter_groups
from pal_ds.engine.training_engine import TrainingEngine


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
    """
    import deepspeed

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

    inference_config = {
        key: value for key, value in ds_config.items() if key not in ("optimizer", "scheduler")
    }
    engine, *_ = deepspeed.initialize(model=model, config=inference_config)
    return engine


def parameter_bytes_on_this_rank(model: nn.Module) -> tuple[int, int]:
    """Return (bytes of parameters on this rank, bytes of the whole model); under ZeRO-3 a rank holds partitions."""
    held = whole = 0
    for parameter in model.parameters():
        partition = getattr(parameter, "ds_tensor", None)
        numel = parameter.numel() if partition is None else int(getattr(parameter, "ds_numel"))  # noqa: B009
        held += (
            parameter.numel() if partition is None else partition.numel()
        ) * parameter.element_size()
        whole += numel * parameter.element_size()
    return held, whole
