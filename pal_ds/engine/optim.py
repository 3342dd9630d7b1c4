"""Parameter groups with their own learning rates, the schedule all of them share, and the optimizer."""

import math
from typing import Any

import torch
from torch import nn

from pal_ds.config.run_config import OptimConfig
from pal_ds.errors import UserError

ParamGroup = dict[str, Any]
"""A parameter group as torch has it: `params` beside the settings that the optimizer reads."""

GROUPS = ("backbone", "prototypes", "scale", "projectors")
_GROUP_OF_NAME = {"prototypes": "prototypes", "log_scale": "scale", "log_threshold": "scale"}


def parameter_groups(model: nn.Module, config: OptimConfig) -> list[ParamGroup]:
    """Sort the trainable parameters into groups: backbone, prototypes, scale, projectors. Empty groups are dropped.

    A head opts into a group by a parameter's last name, `prototypes` or `log_scale` (see docs/heads.md). The threshold
    of ties is a scale.
    """
    members: dict[str, list[nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in model.named_parameters():
        last = name.rpartition(".")[2]
        group = _GROUP_OF_NAME.get(last, "projectors")
        if parameter.requires_grad:
            members["backbone" if name.startswith("backbone.") else group].append(parameter)
    return [
        {"name": name, "params": members[name], **_settings_of(name, config)}
        for name in GROUPS
        if members[name]
    ]


def apply_settings(param_groups: list[ParamGroup], config: OptimConfig) -> None:
    """Set rates and Adam's constants of named groups from the recipe: a checkpoint brings those it was saved with."""
    for group in param_groups:
        group.update(_settings_of(group["name"], config), betas=config.betas, eps=config.epsilon)


def _settings_of(name: str, config: OptimConfig) -> dict[str, float]:
    rates = {
        "backbone": config.backbone_learning_rate,
        "prototypes": config.prototype_learning_rate,
        "scale": config.scale_learning_rate,
    }
    rate = rates.get(name)
    rate = config.learning_rate if rate is None else rate
    # A learnt temperature has no reason to shrink.
    weight_decay = 0.0 if name == "scale" else config.weight_decay
    return {"lr": rate, "full_lr": rate, "weight_decay": weight_decay}


def build_optimizer(
    groups: list[ParamGroup], config: OptimConfig, *, offload: bool
) -> torch.optim.Optimizer:
    """Build AdamW: DeepSpeed's CPU version where the optimizer state is offloaded.

    Raises:
        UserError: there is no parameter to train.
    """
    if not groups:
        raise UserError("Nothing to train: the backbone is frozen and the head has no parameters.")
    options = {"lr": config.learning_rate, "betas": config.betas, "eps": config.epsilon}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, **options)


def schedule_factor(config: OptimConfig, update: int, num_updates: int) -> float:
    """Return the share of the full learning rate at `update` (0-based): linear warm-up, then cosine or constant.

    A pure function of the update, so that a resumed run needs no scheduler state.

    >>> config = OptimConfig(warmup_fraction=0.2, schedule="constant")
    >>> [schedule_factor(config, update, num_updates=20) for update in (0, 1, 3, 19)]
    [0.25, 0.5, 1.0, 1.0]
    """
    num_warmup = math.ceil(config.warmup_fraction * num_updates)
    if update < num_warmup:
        return (update + 1) / num_warmup
    if config.schedule == "constant":
        return 1.0
    progress = (update - num_warmup) / max(1, num_updates - num_warmup)
    return config.final_fraction + (1 - config.final_fraction) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )
