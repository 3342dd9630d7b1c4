"""What a run may start from (`train.init_from`): weights, head and users of another run or of an exported folder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pal_ds.backbones.language import STATE_PREFIX, output_layer_of
from pal_ds.backbones.transformer import read_model_config
from pal_ds.errors import UserError
from pal_ds.export.card import FACTS_NAME
from pal_ds.export.weights import Tensors, trained_head, weights_of
from pal_ds.heads.base import Head
from pal_ds.heads.shapes import Float
from pal_ds.restore import OpenRun, open_run
from pal_ds.run_dir import RunDirectory
from pal_ds.user_ids import UserIds

STOCK_HEAD = "score.weight"
"""What a stock class calls its only tensor beyond the backbone."""


@dataclass(frozen=True)
class Origin:
    """Where weights come from; none of the backbone's is read yet."""

    path: Path
    facts: dict[str, Any]
    """What names it for good: kind, step, hash."""
    info: dict[str, Any]
    """`kind`, `tokens` and `vector_size`, as in dataset.json of the data it was trained on."""
    tokenizer: Path
    tokenizer_rewritten: bool
    model_config: Any
    """transformers config of the backbone; None for vectors."""
    frozen_path: str | None
    """Folder or hub id of a backbone that was never trained and lies outside of the run; weights is None then."""
    weights: Callable[[], Tensors] | None
    """Of the backbone, by the names of its transformers class."""
    output_layer: Tensors | None
    """Of the language model, by its full names, where one lies beside the weights and is not tied."""
    head: str
    """Class name."""
    head_tensors: dict[str, Tensor]
    users: Callable[[Head], tuple[UserIds, Float[Tensor, "U K"]]]
    """Ids and logits, for a head of this very class and these tensors."""


def open_origin(path: Path, *, trust: bool) -> Origin:
    """A run directory at its best step, or at the latest where it has none; or a folder of `tools/consolidate.py`.

    Raises:
        UserError: neither lies there, or it cannot be read; see `open_run` and `open_export`.
    """
    if (path / "config.yaml").is_file():
        return _of_run(path, trust=trust)
    if (path / FACTS_NAME).is_file():
        from pal_ds.origin_export import open_export

        return open_export(path, trust=trust)
    raise UserError(
        f"train.init_from {path}: holds neither config.yaml (a run directory) nor {FACTS_NAME} (an exported folder). "
        "Name a directory that `train` or tools/consolidate.py wrote."
    )


def _of_run(path: Path, *, trust: bool) -> Origin:
    run = RunDirectory(path)
    step = "latest" if run.pointer("best") is None else "best"
    try:
        opened = open_run(run, step, trust=trust)
    except UserError as error:
        raise type(error)(f"train.init_from {path}: {error}") from None
    model_config, frozen_path, weights = _backbone_of(opened)
    return Origin(
        path=path,
        facts={"kind": "run", "step": opened.step, "hash": opened.manifest["checksum"]},
        info=opened.data.info,
        tokenizer=opened.data.tokenizer_path,
        tokenizer_rewritten=False,
        model_config=model_config,
        frozen_path=frozen_path,
        weights=weights,
        output_layer=None if weights is None else _output_layer(opened, model_config),
        head=type(opened.parts.head).__name__,
        head_tensors=dict(trained_head(opened).state_dict()),
        users=lambda _: (opened.users.ids, opened.users.logits),
    )


def _backbone_of(opened: OpenRun) -> tuple[Any, str | None, Callable[[], Tensors] | None]:
    """(config, path of weights that were never trained, how to read weights that were)."""
    backbone = opened.parts.backbone
    if backbone is None:
        return None, None, None
    config = read_model_config(backbone)
    if backbone.tuning == "frozen" and opened.config.backbone.path is not None:
        return config, backbone.path, None
    if backbone.trust_remote_code and getattr(config, "auto_map", None):
        raise UserError(
            f"train.init_from {opened.run.path}: its backbone brings code of its own, which a copy of its trained "
            "weights would lose. Train it in one run, or use a model that transformers has a class for."
        )
    return config, None, lambda: weights_of(opened)


def _output_layer(opened: OpenRun, config: Any) -> Tensors | None:
    """As the run trained it (`loss.lm_weight`), or as it lay beside the weights that the run began with."""
    backbone, checkpoint = opened.parts.backbone, opened.checkpoint
    assert backbone is not None and backbone.path is not None
    files = output_layer_of(backbone.path, config)
    if not files:
        return None
    trained = {name: STATE_PREFIX + name.rsplit(".", 1)[-1] for name in files}

    def read(name: str) -> Iterator[Tensor]:
        if trained[name] in checkpoint:
            yield from checkpoint.pieces(trained[name])
            return
        with safe_open(str(files[name]), "pt") as file:
            yield file.get_tensor(name).float().flatten()

    shapes = {}
    for name, path in files.items():
        with safe_open(str(path), "pt") as file:
            shapes[name] = tuple(file.get_slice(name).get_shape())
    return Tensors(shapes, read)


def logits_of(head: Head, mixtures: Float[Tensor, "U K"]) -> Float[Tensor, "U K"] | None:
    """Logits to which this head gives these mixtures, as s = softmax(w / tau) up to a constant; None where it is not.

    tau is read off what the head makes of the logits (1, 0, .., 0).
    """
    from pal_ds.heads.base import UserState

    head = head.eval()
    probe = torch.zeros(1, mixtures.shape[1])
    probe[0, 0] = 1.0
    with torch.no_grad():
        shares = head.mixture_weights(UserState(probe))[0]
        if mixtures.shape[1] < 2 or not 0 < shares[1] < shares[0]:
            return None
        # Below what a float can tell apart, a share is as good as this one.
        logits = mixtures.double().clamp(min=1e-12).log()
        logits = (logits / (shares[0] / shares[1]).double().log()).float()
        found = head.mixture_weights(UserState(logits))
    return logits if torch.allclose(found, mixtures, atol=1e-5) else None
