"""Origins of a run (`train.init_from`): weights, head and users of another run or of an exported folder."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig

from pal_ds.backbones.language import STATE_PREFIX, output_layer_of
from pal_ds.backbones.transformer import read_model_config
from pal_ds.errors import UserError
from pal_ds.export.card import FACTS_NAME
from pal_ds.export.weights import Tensors, trained_head, weights_of
from pal_ds.inference.load_run import OpenRun, open_run
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.training.init_from.source import Origin


def open_origin(path: Path, *, trust: bool) -> Origin:
    """Open a run directory at its best step, or at the latest where it has none; or a folder of `tools/consolidate.py`.

    Raises:
        UserError: neither lies there, or it cannot be read; see `open_run` and `open_export`.
    """
    if (path / "config.yaml").is_file():
        return _of_run(path, trust=trust)
    if (path / FACTS_NAME).is_file():
        from pal_ds.training.init_from.from_export import open_export

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
    """Return (config, path of weights that were never trained, how to read weights that were)."""
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


def _output_layer(opened: OpenRun, config: PretrainedConfig) -> Tensors | None:
    """Return the output layer as the run trained it (`loss.lm_weight`), or as it lay beside the run's first weights."""
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
