"""Fingerprint of frozen weights: a hash that a checkpoint names them by, since it does not hold them."""

from pathlib import Path

import xxhash

from pal_ds.distributed import phase
from pal_ds.errors import UserError
from pal_ds.io.hashing import feed

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")


def weights_fingerprint(path: str, revision: str | None) -> str:
    """xxh3_128 over the weight files of a local folder; the commit for a hub id, or the id where none is known.

    Raises:
        UserError: the folder holds an adapter, whose base and settings lie outside these files.
    """
    folder = Path(path)
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"backbone.path: {folder} holds a PEFT adapter (adapter_config.json), which transformers would apply to "
            "weights that no hash here covers. Merge it into its base first (merge_and_unload, then save_pretrained)."
        )
    if not folder.is_dir():
        return f"hub:{path}@{revision or 'unknown'}"
    digest = xxhash.xxh3_128()
    for file in sorted(file for pattern in WEIGHT_PATTERNS for file in folder.glob(pattern)):
        digest.update(file.name.encode())
        feed(digest, file, phase.progress)
    return f"xxh3_128:{digest.hexdigest()}"
