"""Estimate of the memory of each GPU under ZeRO-3, from sizes alone: no weights are read, nothing is downloaded."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel, PretrainedConfig

from pal_ds.backbones.language import CHUNK_LOGITS
from pal_ds.backbones.loading import add_adapters
from pal_ds.config.run_config import RunConfig
from pal_ds.engine.ds_config import load_ds_config, offloads_optimizer, zero_stage
from pal_ds.errors import UserError
from pal_ds.modeling.lengths import length_of_texts, num_positions
from pal_ds.remote_code.encoding import drop_unused_modules, state_size_of

MASTER_AND_MOMENTS = 12
"""Bytes of a trained parameter's fp32 master and Adam's two moments."""
GRADIENT = 4
"""Bytes of a trained parameter's gradient: the engine may keep it in fp32."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each GPU, but for the counts. Upper bounds where a figure depends on the order of events."""

    num_parameters: int
    """Parameters of backbone and head."""
    num_trained: int
    weights: float
    """This GPU's slices of all weights, in the run's precision."""
    optimizer: float
    """State of what is trained: gradients, and fp32 masters and moments unless they are offloaded."""
    gathered: float
    """Whole weights of the layers at hand and prefetched."""
    buckets: float
    activations: float
    """Activations of `train.micro_batch_tokens` tokens (or `micro_batch_pairs` texts of full length, twice)."""

    @property
    def total(self) -> float:
        """Sum, without what the allocator loses to fragments (keep a tenth of the GPU free)."""
        return self.weights + self.optimizer + self.gathered + self.buckets + self.activations


def plan_memory(config: RunConfig, model_config: PretrainedConfig, num_gpus: int) -> MemoryPlan:
    """Return the plan of a recipe on `num_gpus` GPUs; `model_config` is the backbone's transformers config.

    Raises:
        UserError: the recipe's engine is not ZeRO-3.
    """
    ds_config, origin = load_ds_config(config.train.ds_config)
    ds_config.setdefault("zero_optimization", {})
    if zero_stage(ds_config) < 3:
        raise UserError(
            f"{origin}: plans are made for ZeRO-3, this is stage {zero_stage(ds_config)}."
        )
    model = _on_meta(config, model_config)
    size = 2 if config.train.precision == "bf16" else 4
    parameters = list(model.parameters())
    num_parameters = sum(p.numel() for p in parameters)
    num_trained = sum(p.numel() for p in parameters if p.requires_grad)
    zero = ds_config["zero_optimization"]
    live = min(num_parameters, int(zero.get("stage3_max_live_parameters", 1e9)))
    largest = max(p.numel() for p in parameters)
    state = GRADIENT + (0 if offloads_optimizer(ds_config) else MASTER_AND_MOMENTS)
    return MemoryPlan(
        num_parameters=num_parameters,
        num_trained=num_trained,
        weights=size * num_parameters / num_gpus,
        optimizer=state * num_trained / num_gpus,
        gathered=size * max(live, largest),
        # Two of them take turns while gradients travel.
        buckets=2 * size * int(zero.get("reduce_bucket_size", 5e8)),
        activations=_activations(config, model_config, size),
    )


def _on_meta(config: RunConfig, model_config: PretrainedConfig) -> nn.Module:
    """Build backbone and head without storage, trainable where the recipe trains."""
    with torch.device("meta"):
        backbone = AutoModel.from_config(model_config)
        drop_unused_modules(backbone)
        if config.backbone.tuning == "lora":
            backbone = add_adapters(backbone, config.backbone, 0)
        head = config.head(state_size_of(model_config, config.backbone.pooling))
    if config.backbone.tuning == "frozen":
        backbone.requires_grad_(False)
    return nn.ModuleList([backbone, head])


def _activations(config: RunConfig, model_config: PretrainedConfig, size: int) -> float:
    """Hidden states that wait for the backward pass, and the working set of one layer; all layers' without checkpoints.

    A layer's working set: about 8 states of width H (norms, queries, keys, values, attention, sums) and 3 of the
    inner width. Nothing waits where the backbone is frozen.
    """
    train = config.train
    # Both responses, each behind its prompt; packed rows hold the prompt once, so this is the most there can be.
    length = length_of_texts(config.data, num_positions(model_config))
    num_tokens = train.micro_batch_tokens or 2 * train.micro_batch_pairs * length
    hidden = model_config.hidden_size
    names = ("intermediate_size", "ffn_dim", "hidden_dim", "n_inner")
    inner = next(filter(None, (getattr(model_config, name, None) for name in names)), 4 * hidden)
    layer = size * num_tokens * (8 * hidden + 3 * inner)
    if config.backbone.tuning == "frozen":
        return float(layer)
    num_layers = model_config.num_hidden_layers
    if config.backbone.gradient_checkpointing:
        kept = size * num_tokens * hidden * num_layers + layer
    else:
        kept = num_layers * layer
    logits = 0
    if config.loss.lm_weight:
        # A chunk and its gradient, and the fp32 sum for the output layer.
        logits = 2 * 4 * CHUNK_LOGITS + 4 * model_config.vocab_size * hidden
    return float(kept + logits)
