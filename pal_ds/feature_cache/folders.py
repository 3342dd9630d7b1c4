"""Folders of `backbone.cache`: everything that decides a frozen backbone's states names them, so no cache can lie."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypedDict, cast

from pal_ds.backbones.config import BackboneConfig, Pooling
from pal_ds.config.run_config import RunConfig
from pal_ds.data.collator import Collator
from pal_ds.errors import UserError
from pal_ds.modeling.build import Parts

_SAYS_NOTHING_OF_STATES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_TOKEN_KEYS = (
    "max_length",
    "truncation_side",
    "prefix_ids",
    "end_ids",
    "end_variants",
    "separator",
    "chat_template",
    "special_tokens",
)


class StatesDescription(TypedDict):
    """`made_from` in cache.json: all that decides the states of one kind of text, whose hash names their folder."""

    states: str
    """"responses" or "prompts"."""
    weights: str
    """Fingerprint of the weight files."""
    model: dict[str, Any]
    """The transformers config, without what says nothing of states."""
    code: str | None
    """Hash of modelling code that comes with the weights."""
    layer: str
    precision: str
    attention: str
    tokenizer: str
    """Hash of vocabulary, rules and chat template."""
    tokens: dict[str, object]
    """Entries of `TokensInfo` that decide token ids."""
    encoding: str
    pooling: str
    """"every token", "last token", "mean" or "max"."""


@dataclass(frozen=True)
class CacheFolder:
    """A folder for the states of one kind of text, read in one way; named by what they are made from."""

    path: Path
    key: str
    made_from: StatesDescription


def cache_folders(
    parts: Parts,
    collator: Collator,
    config: RunConfig,
    base_weights: str | None,
    precision: str,
    *,
    gpu: bool,
) -> dict[str, CacheFolder] | None:
    """`CACHE/responses_KEY` and, for a head that reads prompts, `CACHE/prompts_KEY`; None without `backbone.cache`.

    Args:
        collator: which texts are read, of which data; may be others than those the run was trained on.
        base_weights: fingerprint of the frozen weights.
        precision: in which they are computed.

    Raises:
        UserError: weights that cannot be told from others.
    """
    if config.backbone.cache is None or parts.backbone is None:
        return None
    check_cache_path(config.backbone.cache)
    assert base_weights is not None, "only a frozen backbone's states are kept"
    described = describe_states(
        parts.backbone,
        base_weights,
        collator,
        pooling=parts.pooling,
        prompt_tokens=parts.prompt_tokens,
        precision=precision,
        gpu=gpu,
    )
    folders = {}
    for name, made_from in described.items():
        key = key_of(made_from)
        folders[name] = CacheFolder(Path(config.backbone.cache, f"{name}_{key}"), key, made_from)
    return folders


def check_cache_path(path: str) -> None:
    """Raises UserError where no folder can be."""
    nearest = Path(path)
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not path or not nearest.is_dir():
        what = "is empty" if not path else f"is {path}, and {nearest} is a file"
        raise UserError(
            f"backbone.cache {what}. Give a folder, which is made where it does not exist."
        )


def restored_cache_folders(
    parts: Parts, collator: Collator, config: RunConfig, base_weights: str | None, precision: str
) -> dict[str, CacheFolder] | None:
    """Find the folders as `cache_folders` does, for the model of `restore`, whose attention is its own choice."""
    if parts.backbone is not None:
        parts = replace(parts, backbone=replace(parts.backbone, attention="auto"))
    return cache_folders(parts, collator, config, base_weights, precision, gpu=False)


def describe_states(
    backbone: BackboneConfig,
    weights: str,
    collator: Collator,
    *,
    pooling: Pooling,
    prompt_tokens: bool,
    precision: str,
    gpu: bool,
) -> dict[str, StatesDescription]:
    """Describe what the states of responses (and of prompts, where read) are made from, as plain JSON values.

    Attention is the one that runs: in bf16 flash-attn and SDPA differ in more than a run's last bit, and a change of
    `backbone.attention` is refused on resume as well. Left out is what `backbone.encode_batch_texts`, the device, the
    ZeRO stage and the number of ranks may change in a last bit, as between two starts of a run.

    `weights` is the fingerprint of the weight files.

    Raises:
        UserError: weights by a hub id of unknown commit: nobody could tell whose the states are.
    """
    if weights.endswith("@unknown"):
        raise UserError(
            f"backbone.cache: which commit {backbone.path} is cannot be told here, so states could be of other "
            "weights. Download the model and name its folder in backbone.path."
        )
    # Not above: runs without a language model do without this half a second.
    from pal_ds.backbones.transformer import choose_attention, read_model_config

    model = read_model_config(backbone)
    assert backbone.path is not None
    # Modelling code that comes with the weights; a hub id's commit is in the fingerprint.
    code = sorted(Path(backbone.path).glob("*.py")) if backbone.trust_remote_code else []
    entries = cast(Mapping[str, object], collator.data.info["tokens"])
    common = {
        "weights": weights,
        "model": {
            key: value
            for key, value in model.to_diff_dict().items()
            if key not in _SAYS_NOTHING_OF_STATES
        },
        "code": _hash_of(code) if code else None,
        "layer": "last",
        "precision": precision,
        "attention": choose_attention(backbone.attention, precision, gpu, model)[0],
        "tokenizer": _tokenizer_hash(collator.data.tokenizer_path),
        "tokens": {name: entries[name] for name in _TOKEN_KEYS if name in entries},
        "encoding": collator.encoding,
    }
    every, last = "every token", "last token"
    response = every if collator.scored_positions == "all" else last
    described = {"responses": {**common, "pooling": response if pooling == "last" else pooling}}
    if collator.with_prompt:
        prompt = every if prompt_tokens else last
        described["prompts"] = {**common, "pooling": prompt if pooling == "last" else pooling}
    return {
        states: json.loads(json.dumps({"states": states, **content}, default=str))
        for states, content in described.items()
    }


def key_of(made_from: Mapping[str, object]) -> str:
    """128 bits in hexadecimal."""
    text = json.dumps(made_from, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _tokenizer_hash(folder: Path) -> str:
    """Hash what turns text into ids: vocabulary and rules, and the chat template."""
    digest = hashlib.blake2b(_hash_of([folder / "tokenizer.json"]).encode(), digest_size=16)
    for template in sorted(folder.glob("*.jinja")):
        digest.update(template.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps(settings.get("chat_template")).encode())
    return digest.hexdigest()


def _hash_of(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
