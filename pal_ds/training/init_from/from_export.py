"""An exported folder as the origin of a run: its tensors and its JSON are read, its code is not run."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, PretrainedConfig

from pal_ds.data.tables import DatasetInfo
from pal_ds.distributed import phase
from pal_ds.engine.checkpoint.manifest import refuse_strangers
from pal_ds.errors import UserError
from pal_ds.export.card import FACTS_NAME, FORMAT_VERSION
from pal_ds.export.weights import Tensors
from pal_ds.heads.base import Head
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.io.hashing import feed
from pal_ds.training.init_from.source import Origin, logits_of
from pal_ds.users.ids import UserIds

_PAL_PREFIX = "backbone."
_OF_THE_EXPORT = ("auto_map", "architectures", "canonical", "transformers_version", "dtype")


def open_export(path: Path, *, trust: bool) -> Origin:
    """Open the folder at `path`, once its weights, config and tokenizer are those its export.json lists.

    Raises:
        UntrustedCheckpointError: a stranger may have written it, without `trust`.
        UserError: it is damaged, or of another format.
    """
    try:
        facts = json.loads((path / FACTS_NAME).read_text(encoding="utf-8"))
        listed = facts["sha256"]
        if facts["format_version"] != FORMAT_VERSION:
            raise KeyError("format_version")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"train.init_from {path / FACTS_NAME}: not what this version of pal_ds writes ({error!r}). Export again."
        ) from None
    if not trust:
        for file in (path, *path.iterdir()):
            refuse_strangers(file)
    _verify(path, listed)
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    stock = facts["stock_class"] is not None
    inner = config if stock else config["text_config"]
    model_config = AutoConfig.for_model(
        **{k: v for k, v in inner.items() if k not in _OF_THE_EXPORT}
    )
    files = _tensors(path, listed)
    prefix = _PAL_PREFIX
    if stock:
        prefix = f"{_stock_prefix(model_config)}."
    backbone = {n.removeprefix(prefix): n for n in files if n.startswith(prefix)}
    head = {n.removeprefix("head."): n for n in files if n not in backbone.values()}

    def read(name: str) -> Iterator[Tensor]:
        with safe_open(str(files[backbone[name]]), "pt") as file:
            yield file.get_tensor(backbone[name]).float().flatten()

    def weights() -> Tensors:
        return Tensors({name: _shape(files[full], full) for name, full in backbone.items()}, read)

    digest = hashlib.sha256((path / FACTS_NAME).read_bytes()).hexdigest()
    return Origin(
        path=path,
        facts={"kind": "export", "step": facts["step"], "hash": f"sha256:{digest}"},
        info=cast(DatasetInfo, {"kind": "tokens", "tokens": facts["tokens"], "vector_size": None}),
        tokenizer=path,
        tokenizer_rewritten=stock,
        model_config=model_config,
        frozen_path=None,
        weights=weights,
        output_layer=None,
        head=facts["head"],
        head_tensors={name: _tensor(files[full], full) for name, full in head.items()},
        users=lambda head: _users(path, head),
    )


def _verify(path: Path, listed: dict[str, str]) -> None:
    """Raise UserError where a file that is read here is not the one that was exported."""
    for name in sorted(listed):
        if name.endswith((".safetensors", ".json")) or name == "users.jsonl":
            file = path / name
            if not file.is_file():
                raise UserError(f"train.init_from {file}: listed in {FACTS_NAME} but missing.")
            content = feed(hashlib.sha256(), file, phase.progress).hexdigest()
            if content != listed[name]:
                raise UserError(
                    f"train.init_from {file}: its content does not match the hash in {FACTS_NAME}. Export again."
                )


def _tensors(path: Path, listed: dict[str, str]) -> dict[str, Path]:
    """Return the file of each tensor."""
    file_of = {}
    for name in sorted(listed):
        if name.endswith(".safetensors"):
            with safe_open(str(path / name), "pt") as file:
                file_of |= dict.fromkeys(file.keys(), path / name)
    return file_of


def _shape(file: Path, name: str) -> tuple[int, ...]:
    with safe_open(str(file), "pt") as stream:
        return tuple(stream.get_slice(name).get_shape())


def _tensor(file: Path, name: str) -> Tensor:
    with safe_open(str(file), "pt") as stream:
        return stream.get_tensor(name).float()


def _stock_prefix(model_config: PretrainedConfig) -> str:
    stock: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(model_config)]
    return stock.base_model_prefix


def _users(path: Path, head: Head) -> tuple[UserIds, Float[Tensor, "U K"]]:
    """Return the users of `--with_users`, whose mixtures the folder holds; nobody where it or the head has none."""
    nobody = UserIds.of(()), torch.empty(0, head.num_prototypes)
    file = path / "users.jsonl"
    if not file.is_file():
        return nobody
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    logits = logits_of(head, torch.tensor([line["mixture"] for line in lines]))
    return nobody if logits is None else (UserIds.of([line["user_id"] for line in lines]), logits)
