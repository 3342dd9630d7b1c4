"""Sources of the tensors of an exported model, under the names of its transformers class."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pal_ds.errors import UserError
from pal_ds.export.writer import Shapes
from pal_ds.heads.base import Head
from pal_ds.inference.load_run import OpenRun, load_model
from pal_ds.model import RewardModel

_TRAINED_BACKBONE = "backbone.model."


@dataclass(frozen=True)
class Tensors:
    """Backbone tensors by their name in the transformers base model."""

    shapes: Shapes
    read: Callable[[str], Iterator[Tensor]]
    """The values of a tensor in order, in flat pieces, fp32."""


@dataclass(frozen=True)
class Weights(Tensors):
    """Backbone tensors by their name in the transformers base model, and the trained head."""

    head: Head


def weights_of(opened: OpenRun) -> Weights:
    """Stream a backbone that was trained whole; load one that was frozen or adapted.

    Adapters are merged into their matrices in fp32.
    """
    checkpoint = opened.checkpoint
    if opened.parts.backbone is not None and opened.parts.backbone.tuning == "full":
        names = [n for n in checkpoint.names if n.startswith(_TRAINED_BACKBONE)]
        shapes = {n.removeprefix(_TRAINED_BACKBONE): checkpoint.shape(n) for n in names}
        head = trained_head(opened)
        return Weights(shapes, lambda name: checkpoint.pieces(_TRAINED_BACKBONE + name), head)
    model = load_model(opened)
    tensors = dict(plain_backbone(model).state_dict())
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    return Weights(shapes, lambda name: iter([tensors[name].flatten()]), model.head)


def plain_backbone(model: RewardModel) -> torch.nn.Module:
    """Return the transformers model inside a reward model, adapters merged (in place) if it has any."""
    backbone: Any = model.backbone
    inner = backbone.model
    return inner.merge_and_unload() if hasattr(inner, "merge_and_unload") else inner


@torch.no_grad()
def trained_head(opened: OpenRun) -> Head:
    """Return the head of an open run with its trained weights, in eval mode. Raises UserError where they do not fit."""
    head = opened.parts.head
    for name, tensor in head.state_dict().items():
        full = f"head.{name}"
        if full not in opened.checkpoint or opened.checkpoint.shape(full) != tuple(tensor.shape):
            raise UserError(
                f"{opened.checkpoint.path}: {full} is missing or has another shape than "
                "config.yaml of the run describes."
            )
        tensor.copy_(opened.checkpoint.tensor(full))
    return head.eval().requires_grad_(False)


def exported_tensors(
    target: PreTrainedModel, weights: Tensors, backbone_prefix: str, head_tensors: dict[str, Tensor]
) -> tuple[Shapes, Callable[[str], Iterator[Tensor]]]:
    """Return (shapes, read) for `write_sharded` of all tensors of `target` (on the meta device); all must be there.

    Raises:
        UserError: a tensor is missing, empty, of another shape, or has no place in the target.
    """
    tied = set(getattr(target, "all_tied_weights_keys", None) or ())
    wanted = {n: tuple(t.shape) for n, t in target.state_dict().items() if n not in tied}
    given = {f"{backbone_prefix}{n}": shape for n, shape in weights.shapes.items()}
    given |= {n: tuple(t.shape) for n, t in head_tensors.items()}
    for name, shape in wanted.items():
        if given.get(name) != shape or 0 in shape:
            raise UserError(
                f"{name}: the exported model needs shape {shape}, and was given {given.get(name)}."
            )
    if surplus := sorted(set(given) - set(wanted) - tied):
        raise UserError(f"{surplus[0]}: was given, and the exported model has no such tensor.")

    def read(name: str) -> Iterator[Tensor]:
        if name in head_tensors:
            return iter([head_tensors[name].flatten()])
        return weights.read(name.removeprefix(backbone_prefix))

    return wanted, read
