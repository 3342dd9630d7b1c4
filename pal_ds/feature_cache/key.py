"""Everything that decides a frozen backbone's states, so that a cache can be found by it and never lie."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from pal_ds.backbones.config import BackboneConfig, Pooling
from pal_ds.backbones.transformer import choose_attention, read_model_config
from pal_ds.data.collator import Collator
from pal_ds.errors import UserError
from pal_ds.feature_cache.writers import StatesDescription

_SAYS_NOTHING_OF_STATES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
_TOKEN_KEYS = (
    "max_length",
    "truncation_side",
    "prefix_ids",
    "end_ids",
    "separator",
    "chat_template",
    "special_tokens",
)


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
    entries = cast(Mapping[str, object], collator.data.info["tokens"])
    common = {
        "weights": weights,
        "model": _model_of(backbone),
        "code": _code_hash(backbone),
        "layer": "last",
        "precision": precision,
        "attention": choose_attention(
            backbone.attention, precision, gpu, read_model_config(backbone)
        )[0],
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


def _model_of(backbone: BackboneConfig) -> dict[str, Any]:
    content = read_model_config(backbone).to_diff_dict()
    return {key: value for key, value in content.items() if key not in _SAYS_NOTHING_OF_STATES}


def _code_hash(backbone: BackboneConfig) -> str | None:
    """Hash modelling code that comes with the weights; a hub id's commit is in the fingerprint."""
    assert backbone.path is not None
    files = sorted(Path(backbone.path).glob("*.py")) if backbone.trust_remote_code else []
    return _hash_of(files) if files else None


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
