"""Fitted users on the disk, shard by shard, so that fitting many of them can be cut off and taken up again.

OUT/fitting/KEY/00012.safetensors is whole or absent, and holds a hash of its own numbers: a flipped bit is found. KEY
is a hash of everything that the numbers depend on: shards of other inputs are never taken for these.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pal_ds.errors import writing
from pal_ds.heads.jaxtyping_fallback import Float, Int
from pal_ds.io.files import replacing

logger = logging.getLogger(__name__)

FOLDER = "fitting"
_VERSION = 2


class FittedShard(NamedTuple):
    """Users of one shard, in their order."""

    logits: Float[Tensor, "U K"]
    num_pairs: Int[Tensor, "U"]
    num_right: Float[Tensor, "U"]
    """Pairs that the fit explains, fp64; a tie counts half."""


class ShardFolder:
    """The shards of one set of inputs under OUT/fitting."""

    def __init__(self, out: Path, inputs: Mapping[str, object]) -> None:
        """`inputs` (JSON) is what the fits depend on. Raises StorageError where OUT cannot be written."""
        text = json.dumps({"version": _VERSION, **inputs}, sort_keys=True)
        key = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.out, self.path = out, out / FOLDER / key
        with writing(out):
            self.path.mkdir(parents=True, exist_ok=True)

    def read(self, number: int, num_users: int) -> FittedShard | None:
        """The shard if it is there and whole."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._file(number)
        if not path.is_file():
            return None
        try:
            parts = load_file(path)
            written_hash = bytes(parts.pop("hash", torch.empty(0)).tolist())
            shard = FittedShard(**parts)
            if written_hash != _hash_of(shard):
                raise ValueError("not the numbers that were written")
        except (SafetensorError, TypeError, ValueError) as error:
            logger.warning("%s: damaged (%s); its users are fitted again", path, error)
            return None
        return shard if len(shard.logits) == num_users else None

    def write(self, number: int, shard: FittedShard) -> None:
        """Puts the shard on the disk under its name, whole. Raises StorageError where that fails."""
        from safetensors.torch import save_file

        path = self._file(number)
        with writing(path), replacing(path) as aside:
            own = torch.tensor(list(_hash_of(shard)), dtype=torch.uint8)
            save_file({**shard._asdict(), "hash": own}, aside)

    def remove(self) -> None:
        """Shards of these inputs and of any others: the result has been written."""
        shutil.rmtree(self.out / FOLDER)

    def _file(self, number: int) -> Path:
        return self.path / f"{number:05d}.safetensors"


def _hash_of(shard: FittedShard) -> bytes:
    """Hash the shard's tensors; 16 bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for part in shard:
        digest.update(part.contiguous().numpy().tobytes())
    return digest.digest()
