"""Heads of the PAL reference (RamyaLab/pluralistic-alignment) as ours: its parameters, its variants.

What a variant computes is read from the reference's code at commit fcfc03c0. A variant whose reward of
a text is a function of that text, prompt and user is represented exactly; the others are refused by name.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .base import Head
from .jaxtyping_fallback import Float
from .pal_a import PalA
from .pal_b import PalB

BACKBONE = "llm."
"""Prefix of the names of a backbone's tensors once copies are merged."""
_BATCH_NORM_EPSILON = 1e-5
_ARCHITECTURE = re.compile(
    r"mlp(\d+)-(relu|gelu|linear)-dropout\d+"
    r"(-residual|-batchnorm|-residual-batchnorm|-batchnorm-residual|-nobias)?"
)
_REFUSED_POINTS = {
    "|f(P)|w": "divides column j of f(P) by the length of row j, which exists only for K = d and is no "
    "mixture of K points"
}
_READS_OTHERS = (
    "subtracts the user's points of one text from the positions of another, so a reward depends on"
)
_REFUSED_SIMILARITIES = {
    PalA: {
        "dist_normalization": "divides by a norm over the positions of the padded text, so a reward depends on the "
        "other tokens and on the padding",
        "dist_logistic": "gives scale * distance as the logit, so it learned to prefer the response that is farther "
        "from the user; rewards here are minus the distance",
        "norm": "has no code in the reference",
    },
    PalB: {
        "dist": f"{_READS_OTHERS} the rest of the batch",
        "dist_normalization": "divides by norms over the positions of the padded text",
        "dist_logistic": f"{_READS_OTHERS} the rest of the batch",
        "angle_hinge": "divides the user's point by a norm over the positions of the padded prompt",
        "norm": "has no code in the reference",
    },
}


class ReferenceHead(NamedTuple):
    """A head with the reference's parameters, and the users that came with it."""

    head: Head
    hidden_size: int
    init: dict[str, Any]
    """Arguments of the head's class, beside the hidden size."""
    user_ids: list[str]
    logits: Float[Tensor, "U K"]


def merge_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under one name each: the reference's modules share parts, which a state dict repeats.

    Raises:
        ValueError: two copies of a part differ.
    """
    has_map = any(name.startswith("projector_f.") for name in tensors)
    projector = "projector_f." if has_map else "projector."
    aliases = {
        "item_learner.llm.": BACKBONE,
        "user_learner.llm.": BACKBONE,
        "item_learner.projector.": projector,
        "user_learner.projector.": projector,
        "user_learner.softmax.": "softmax_w.",
    }
    merged: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        alias = next((alias for alias in aliases if name.startswith(alias)), None)
        own = name if alias is None else aliases[alias] + name.removeprefix(alias)
        known = merged.setdefault(own, tensor)
        if known.data_ptr() != tensor.data_ptr() and not torch.equal(known, tensor):
            raise ValueError(f"{own} and its copy {name} differ; in the reference they are one.")
    return merged


def head_from_reference(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], prompt_position: str = "last"
) -> ReferenceHead:
    """The reference's head in eval mode, fp32.

    Args:
        tensors: what `merge_copies` gave, without the backbone's.
        config: the reference's `prefLearner_config`: `pref_learner_type`, `proj_arch`, `sfx_type`, and
            `user_learner_type` for PAL-A; the tensors do not say which of these they belong to.
        prompt_position: of PAL-B. `last` is how the reference serves a model, `aligned` how it trains one.

    Raises:
        ValueError: a variant that cannot be represented, or tensors that are not those of the config.
    """
    rest = dict(tensors)
    kind = _kind(rest, config)
    user_ids, logits = _users(rest)
    scale = rest.pop("logit_scale", None)
    temperature = rest.pop("softmax_w.temperature", None)
    init = {
        "num_prototypes": logits.shape[1],
        "temperature": float(
            config.get("sfx_temperature", 1.0) if temperature is None else temperature
        ),
    }
    if init["num_prototypes"] != config.get("k", init["num_prototypes"]):
        raise ValueError(f"k: {config['k']}, and users have {init['num_prototypes']} weights.")
    architecture = _Architecture.of(_required(config, "proj_arch"))
    if kind is PalA:
        state = _pal_a(rest, config, architecture, init)
    else:
        state = _pal_b(rest, config, architecture, init)
        init["prompt_position"] = prompt_position
    if rest:
        raise ValueError(
            f"{sorted(rest)[0]} is no parameter of the model that the config describes."
        )
    if kind is PalB or init["similarity"] == "cosine":
        if scale is None:
            raise ValueError("logit_scale is missing.")
        state["log_scale"] = scale.reshape(1)
    head = _loaded(kind, config["d_hid"], state, init)
    return ReferenceHead(head, config["d_hid"], init, user_ids, logits)


def _kind(rest: dict[str, Tensor], config: Mapping[str, Any]) -> type[PalA] | type[PalB]:
    """Choose the head that the config describes. Raises ValueError where there is none, or not for these tensors."""
    kind: type[PalA] | type[PalB] = PalA if "user_learner_type" in config else PalB
    if ("user_learner.P" in rest) != (kind is PalA):
        raise ValueError(
            f"the config is one of {'PAL-A' if kind is PalA else 'PAL-B'} "
            f"({'with' if kind is PalA else 'without'} user_learner_type), the checkpoint is not."
        )
    similarity = _required(config, "pref_learner_type")
    if reason := _REFUSED_SIMILARITIES[kind].get(similarity):
        raise ValueError(f"pref_learner_type: {similarity} {reason}.")
    if similarity not in ("dist", "angle", "angle_hinge"):
        raise ValueError(f"pref_learner_type: {similarity} is unknown.")
    if _required(config, "sfx_type") != "softmax":
        raise ValueError(
            f"sfx_type: {config['sfx_type']} draws a new mixture at every evaluation, so a user has no one reward."
        )
    return kind


def _users(rest: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """Removes the users' weights from `rest`: (ids, logits [U, K] fp32)."""
    names = [name for name in rest if name.startswith("user_learner.W.")]
    if not names:
        raise ValueError("the checkpoint holds no users (user_learner.W.ID).")
    rows = [rest.pop(name).float() for name in names]
    if len({tuple(row.shape) for row in rows}) != 1:
        raise ValueError("user_learner.W: users have different numbers of weights.")
    return [name.removeprefix("user_learner.W.") for name in names], torch.stack(rows)


class _Architecture(NamedTuple):
    """Read `proj_arch`."""

    name: str
    num_layers: int
    """Linear maps; 0 for `identity`."""
    activation: str
    residual: bool

    @classmethod
    def of(cls, name: str) -> "_Architecture":
        if name == "identity":
            return cls(name, 0, "linear", False)
        found = _ARCHITECTURE.fullmatch(name)
        if found is None:
            raise ValueError(f"proj_arch: {name} is none of the reference's.")
        return cls(name, int(found[1]) + 1, found[2], "residual" in (found[3] or ""))

    def arguments(self, layers: list[tuple[Tensor, Tensor]]) -> dict[str, bool | int | str]:
        """Give the arguments of our projector for these linear maps."""
        shape = {"dim": len(layers[-1][1]), "num_layers": len(layers), "residual": self.residual}
        return shape if self.activation == "linear" else {**shape, "activation": self.activation}

    def take(self, rest: dict[str, Tensor], prefix: str, width: int) -> list[tuple[Tensor, Tensor]]:
        """Removes a projector's tensors from `rest` and gives (weight, bias) of each linear map.

        Batch norms (affine in evaluation) are folded into the map before them, maps without a nonlinearity
        between them into one, and the identity is the map by the unit matrix.
        """
        if self.name == "identity":
            return [(torch.eye(width), torch.zeros(width))]
        modules: dict[int, dict[str, Tensor]] = {}
        for name in [n for n in rest if n.startswith(prefix)]:
            index, _, field = name.removeprefix(prefix).removeprefix("layers.").partition(".")
            modules.setdefault(int(index), {})[field] = rest.pop(name).double()
        layers: list[tuple[Tensor, Tensor]] = []
        for _, module in sorted(modules.items()):
            weight, bias = module["weight"], module.get("bias")
            if "running_mean" in module:
                assert bias is not None, "a batch norm of the reference has a bias"
                factor = weight * (module["running_var"] + _BATCH_NORM_EPSILON).rsqrt()
                before, offset = layers[-1]
                shift = (offset - module["running_mean"]) * factor + bias
                layers[-1] = (before * factor[:, None], shift)
            else:
                layers.append((weight, weight.new_zeros(len(weight)) if bias is None else bias))
        if len(layers) != self.num_layers or layers[0][0].shape[1] != width:
            raise ValueError(
                f"{prefix}: {len(layers)} linear maps from width {layers[0][0].shape[1] if layers else None}; "
                f"proj_arch {self.name} has {self.num_layers}, d_hid is {width}."
            )
        while self.activation == "linear" and len(layers) > 1:
            (first, offset), (second, bias) = layers[:2]
            layers[:2] = [(second @ first, second @ offset + bias)]
        return [(weight.float(), bias.float()) for weight, bias in layers]


def _pal_a(
    rest: dict[str, Tensor], config: Mapping[str, Any], architecture: _Architecture, init: dict
) -> dict[str, Tensor]:
    point = config["user_learner_type"]
    if reason := _REFUSED_POINTS.get(point):
        raise ValueError(f"user_learner_type: {point} {reason}.")
    layers = architecture.take(rest, "projector.mlp.", _required(config, "d_hid"))
    similarity = "distance" if config["pref_learner_type"] == "dist" else "cosine"
    init |= {**architecture.arguments(layers), "user_point": point, "similarity": similarity}
    return {"prototypes": rest.pop("user_learner.P"), **_named("projector", layers)}


def _pal_b(
    rest: dict[str, Tensor], config: Mapping[str, Any], architecture: _Architecture, init: dict
) -> dict[str, Tensor]:
    width = _required(config, "d_hid")
    layers = architecture.take(rest, "projector_f.mlp.", width)
    maps = [
        architecture.take(rest, f"user_learner.projectors.{k}.mlp.", width)
        for k in range(init["num_prototypes"])
    ]
    stacked = [
        tuple(torch.stack(tensors) for tensors in zip(*layer, strict=True))
        for layer in zip(*maps, strict=True)
    ]
    # A partition evaluates by the largest logit alone.
    evaluation = "hard" if config.get("is_partition", False) else "soft"
    init |= {**architecture.arguments(layers), "evaluation": evaluation}
    return {**_named("response_projector", layers), **_named("prompt_projectors", stacked)}


def _named(name: str, layers: list) -> dict[str, Tensor]:
    return {
        f"{name}.layers.{index}.{field}": tensor
        for index, layer in enumerate(layers)
        for field, tensor in zip(("weight", "bias"), layer, strict=True)
    }


def _loaded(
    kind: type[PalA] | type[PalB], width: int, state: dict[str, Tensor], init: dict
) -> Head:
    head = kind(width, **init)
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"the checkpoint's tensors do not fit its config: {error}") from None
    return head.eval().requires_grad_(False)


def _required(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ValueError(f"the config has no {key}; give the reference's prefLearner_config.")
    return config[key]
