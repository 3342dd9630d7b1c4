"""Folders of `backbone.cache` that a run's states belong to: one for responses, one for prompts."""

from dataclasses import replace
from pathlib import Path

from pal_ds.config.run_config import RunConfig
from pal_ds.data.collator import Collator
from pal_ds.errors import UserError
from pal_ds.feature_cache.writers import CacheFolder
from pal_ds.modeling.build import Parts


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
    from pal_ds.feature_cache.key import describe_states, key_of

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
