"""The transformers config and class of an exported model, and its config.json."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from pal_ds.backbones.transformer import read_model_config
from pal_ds.data.tokenise import truncation_side
from pal_ds.errors import UserError
from pal_ds.export.bundle_code import write_pal_code
from pal_ds.export.weights import Layout, Weights
from pal_ds.heads.base import Head
from pal_ds.inference.load_run import OpenRun
from pal_ds.remote_code.canonical_rows import CanonicalRows
from pal_ds.remote_code.encoding import drop_unused_modules
from pal_ds.remote_code.modeling_pal import PalForSequenceClassification, PalRewardConfig

Json = dict[str, Any]
"""A config as config.json holds it."""
PAL_AUTO_MAP = {
    "AutoConfig": "modeling_pal.PalRewardConfig",
    "AutoModelForSequenceClassification": "modeling_pal.PalForSequenceClassification",
}


def backbone_config(opened: OpenRun) -> PretrainedConfig:
    """Return the backbone's own config, without traces of this machine."""
    backbone = opened.parts.backbone
    if backbone is None:
        raise UserError(
            f"{opened.run.path}: was trained on vectors, so it reads no texts: it can neither score nor export. "
            "`evaluate --data FILE` measures it on comparisons of vectors; to score texts, train on texts."
        )
    if backbone.trust_remote_code:
        raise UserError(
            f"{opened.run.path}: its backbone brings code of its own (backbone.trust_remote_code), "
            "which an exported folder cannot carry. Score with `score --run_dir` instead."
        )
    config = read_model_config(backbone)
    config._name_or_path = ""
    config.use_cache = False
    return config


def pal_config(opened: OpenRun, mixture: list[float] | None) -> PalRewardConfig:
    """Return the config of PalForSequenceClassification for a run.

    Raises:
        UserError: vector data, a backbone with code of its own, or a head that scores pairs of
            positions (`aligned`), for which a single text has no score.
    """
    if opened.parts.prompt_tokens:
        raise UserError(
            "head.prompt_position: aligned compares positions of a pair, so one text has no score "
            "of its own. Train with prompt_position: last to export."
        )
    inner = backbone_config(opened)
    tokens, parts = opened.data.info["tokens"], opened.parts
    more: dict[str, Any] = {key: tokens[key] for key in ("end_variants",) if key in tokens}
    return PalRewardConfig(
        text_config=inner,
        head={"name": head_name(type(parts.head)), "init": head_arguments(opened)},
        mixture=mixture,
        encoding=parts.collator.encoding,
        pooling=parts.pooling,
        truncation_side=truncation_side(tokens),
        prefix_ids=tokens["prefix_ids"],
        end_ids=tokens["end_ids"],
        **more,
        marker_ids=tokens["marker_ids"],
        user_marker_ids=tokens["user_marker_ids"],
        max_tokens=tokens["max_length"],
        pad_token_id=tokens["pad_token_id"],
    )


def head_name(head: type[Head]) -> str:
    """A head's name in an exported config: the class's for ours, the import path for one of one's own."""
    own = head.__module__.partition(".")[0] != "pal_ds"
    return f"{head.__module__}.{head.__name__}" if own else head.__name__


def head_arguments(opened: OpenRun) -> dict[str, Any]:
    """Return the head's constructor arguments as the run's config.yaml has them."""
    recipe = yaml.safe_load(opened.run.config_file.read_text())
    head = recipe["head"]
    return dict(head.get("init_args") or {}) if isinstance(head, dict) else {}


def stock_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return transformers' own sequence classifier for a decoder, if it is one linear map on top."""
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return None
    stock: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
    config.num_labels = 1
    with torch.device("meta"):
        model = stock(config)
    prefix = f"{stock.base_model_prefix}."
    others = [name for name in model.state_dict() if not name.startswith(prefix)]
    return stock if others == ["score.weight"] else None


def canonical_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a stock class with rows brought to the trainer's form first."""
    return type(f"Canonical{stock.__name__}", (CanonicalRows, stock), {"__module__": __name__})


def pal_layout(folder: Path, config: PalRewardConfig, weights: Weights) -> Layout:
    """Write config and code of our own class, and say what its tensors are called."""
    write_pal_code(folder, weights.head)
    target = on_meta(PalForSequenceClassification, config)
    write_config(folder, config, PalForSequenceClassification.__name__, PAL_AUTO_MAP)
    head_tensors = {f"head.{name}": t for name, t in weights.head.state_dict().items()}
    return Layout(target, weights, "backbone.", head_tensors)


def on_meta(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Build a model without storage: names and shapes of its tensors."""
    with torch.device("meta"):
        model = cls(config)
    for module in model.children():
        drop_unused_modules(module)
    return model


def write_config(
    folder: Path, config: PretrainedConfig, architecture: str, auto_map: dict[str, str]
) -> None:
    """Write config.json, saying which class of which file opens the folder."""
    config.architectures = [architecture]
    config.auto_map = auto_map
    # `pipeline("text-classification")` would put rewards through a sigmoid.
    config.problem_type = "regression"
    config.save_pretrained(folder)
    _change_config(folder, _with_older_names)
    if "AutoConfig" in auto_map:
        _change_config(
            folder, lambda content: {**content, "tokenizer_class": _tokenizer_class(folder)}
        )


def _tokenizer_class(folder: Path) -> str:
    """Name of the tokenizer's class: transformers 4 gives a pipeline no tokenizer where a config of ours names none."""
    file = folder / "tokenizer_config.json"
    named = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return str(named.get("tokenizer_class") or "PreTrainedTokenizerFast")


def add_probe(folder: Path, probe: Mapping[str, object]) -> None:
    """Write scores into config.json that other versions of transformers are held to (`check_probe`)."""
    _change_config(folder, lambda config: {**config, "probe": probe})


def _change_config(folder: Path, change: Callable[[Json], Json]) -> None:
    """Write config.json anew, as `change` has it."""
    file = folder / "config.json"
    content = change(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _with_older_names(config: Json) -> Json:
    """Add the names under which transformers 4 looks for rotary positions; it would take its defaults in silence.

    transformers 5 reads either, and they say the same.
    """
    config = {k: _with_older_names(v) if isinstance(v, dict) else v for k, v in config.items()}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    everywhere = rope.get("full_attention") or rope
    local = (rope.get("sliding_attention") or {}).get("rope_theta")
    theta, part = everywhere.get("rope_theta"), everywhere.get("partial_rotary_factor")
    older: Json = {"rope_theta": theta, "partial_rotary_factor": part}
    kind = str(config.get("model_type"))
    if kind.startswith("gpt_neox"):
        older |= {"rotary_emb_base": theta, "rotary_pct": part}
    elif kind.startswith("modernbert"):
        older |= {"global_rope_theta": theta, "local_rope_theta": local}
    elif local is not None:
        older["rope_local_base_freq"] = local
    is_plain = everywhere.get("rope_type", "default") == "default"
    if not is_plain and (everywhere is rope or kind.startswith("gemma3")):
        apart = ("rope_theta", "partial_rotary_factor")
        older["rope_scaling"] = {k: v for k, v in everywhere.items() if k not in apart}
    return {**{k: v for k, v in older.items() if v is not None}, **config}
