"""A checkpoint of the PAL reference (RamyaLab/pluralistic-alignment) as an exported folder and a user table."""

import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PretrainedConfig

from pal_ds.backbones.loading import refusing_pickles
from pal_ds.data.tokenise import load_tokenizer
from pal_ds.errors import UserError, writing
from pal_ds.export import card, contents
from pal_ds.export.audience import choose_audience
from pal_ds.export.configs import add_probe, pal_layout
from pal_ds.export.pal_reference.text import TextForm
from pal_ds.export.parity import probe_of
from pal_ds.export.weights import DTYPES, Weights, parse_size, write_weights
from pal_ds.heads.base import Head
from pal_ds.heads.pal_reference import (
    BACKBONE,
    ReferenceHead,
    head_from_reference,
    merge_copies,
)
from pal_ds.inference.fitted_to import head_hash, write_record
from pal_ds.io.files import new_folder, refuse_existing
from pal_ds.io.yaml_files import read_yaml
from pal_ds.remote_code.encoding import hidden_size_of
from pal_ds.remote_code.modeling_pal import PalForSequenceClassification, PalRewardConfig
from pal_ds.users import UserTable

_COMPUTED = ("position_ids", "inv_freq")
"""Buffers that older versions of transformers saved and that follow from the config."""


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """All that a checkpoint of the reference does not say by itself."""

    config: Path
    """The prefLearner_config (YAML) of the checkpoint."""
    backbone: Path
    """Folder with the backbone's config and tokenizer, and its weights where the checkpoint has none."""
    users_out: Path | None = None
    """Folder for the user table; None: it is not written."""
    user: str | None = None
    mixture: Sequence[float] | None = None
    end_text: str = "<|endoftext|>"
    """`end_of_conversation_token` of the reference's ds_config."""
    prompt_end: str = " Assistant:"
    """Text at the end of every prompt: for PAL-B, which must find the response in a text."""
    max_length: int = 512
    """`max_seq_len` of the reference's ds_config."""
    dtype: str = "fp32"
    max_shard_size: str = "4GB"
    quiet: bool = False


def import_checkpoint(checkpoint: Path, out: Path, options: ImportOptions) -> card.ImportedExport:
    """Write the exported folder `out`, and the users; return the folder's facts (export.json).

    Raises:
        UserError: a file that is no such checkpoint, holds objects beside tensors, or a variant that
            cannot be represented; `out` or the users' folder holds something.
        StorageError: nothing can be written there.
    """
    parse_size(options.max_shard_size)
    for folder in filter(None, (out, options.users_out)):
        refuse_existing(folder)
    tensors = read_checkpoint(checkpoint)
    try:
        merged = merge_copies(tensors)
        backbone = {n: t for n, t in merged.items() if n.startswith(BACKBONE)}
        rest = {n: t for n, t in merged.items() if n not in backbone}
        imported = head_from_reference(rest, _read_config(options.config))
    except ValueError as error:
        raise UserError(f"{checkpoint} with {options.config}: {error}") from None
    backbone = {n.removeprefix(BACKBONE): t for n, t in backbone.items()}
    users = UserTable(imported.logits.shape[1], imported.user_ids)
    users.logits.copy_(imported.logits)
    users.seen.fill_(True)
    with new_folder(out) as folder:
        facts = _fill(folder, checkpoint, imported, users, backbone, options)
        card.write_card(folder, facts)
        contents.write_facts(folder, facts)
        if options.users_out is not None:
            with writing(options.users_out):
                users.save(options.users_out)
                head = head_hash(imported.head)
                write_record(options.users_out, {"run": checkpoint.name, "step": 0, "head": head})
    return facts


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a Lightning checkpoint or a state dict, under names without the learner's prefix.

    Raises:
        UserError: no such file, no checkpoint of PAL, or one that holds objects, which are not loaded.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: is no checkpoint that torch.save wrote, or it was cut off.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path}: holds {named[1] if named else 'objects'} beside its tensors, and to load objects is to run "
            "code. If you trust the file, write its tensors alone, where the reference's packages are installed: c = "
            f"torch.load('{path.name}', weights_only=False); torch.save(c['state_dict'], 'tensors.pt')."
        ) from None
    except RuntimeError as error:
        raise UserError(f"{path}: is no checkpoint, or damaged ({error}).") from None
    if isinstance(content, Mapping) and "state_dict" in content:
        content = content["state_dict"]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: holds no state dict.")
    first = next((str(name) for name in content if "user_learner." in str(name)), None)
    if first is None:
        raise UserError(f"{path}: is no checkpoint of PAL: it has no user_learner.")
    prefix = first[: first.index("user_learner.")]
    for name, tensor in content.items():
        if not isinstance(tensor, Tensor) or not str(name).startswith(prefix):
            raise UserError(f"{path}: {name} is no tensor of PAL's learner ('{prefix}...').")
    return {str(name).removeprefix(prefix): tensor for name, tensor in content.items()}


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"--config {path}: no such file; give the reference's prefLearner_config.")
    try:
        return read_yaml(path)
    except UserError as error:
        raise UserError(f"--config {error}") from None


def _fill(
    folder: Path,
    checkpoint: Path,
    imported: ReferenceHead,
    users: UserTable,
    backbone: dict[str, Tensor],
    options: ImportOptions,
) -> card.ImportedExport:
    head = imported.head
    audience = choose_audience(head, users, user=options.user, mixture=options.mixture)
    inner = _backbone_config(options.backbone, imported.hidden_size)
    form = TextForm.of(
        load_tokenizer(str(options.backbone)),
        end_text=options.end_text,
        prompt_end=options.prompt_end if "prompt" in head.needs else None,
    )
    pad = form.write_tokenizer(options.backbone, folder, options.max_length)
    config = PalRewardConfig(
        text_config=inner,
        head={"name": type(head).__name__, "init": imported.init},
        mixture=audience.mixture,
        **form.config,
        max_tokens=options.max_length,
        pad_token_id=pad,
    )
    layout = pal_layout(folder, config, _weights(backbone, options.backbone, head))
    shown = None if options.quiet else "importing"
    read = write_weights(folder, layout, options.dtype, options.max_shard_size, shown)
    _check(folder, read, DTYPES[options.dtype])
    return {
        "format_version": card.FORMAT_VERSION,
        "head": type(head).__name__,
        "family": head.family,
        "stock_class": None,
        "audience": audience.description,
        "mixture": audience.mixture,
        "head_hash": head_hash(head),
        "licence": None,
        "backbone": _read_config(options.config).get("llm_name", "not stated"),
        "dtype": options.dtype,
        "reads_prompt": "prompt" in head.needs,
        "end_in_tokenizer": form.written_end,
        "tokens": {
            "tokenizer": options.backbone.name,
            "vocab_size": config.text_config.vocab_size,
            "max_length": options.max_length,
            "prefix_ids": config.prefix_ids,
            "end_ids": config.end_ids,
            "marker_ids": config.marker_ids,
            "user_marker_ids": None,
            # The reference joins prompt and response as they are; the model adds special tokens.
            "separator": "",
            "chat_template": False,
            "special_tokens": False,
            "pad_token_id": config.pad_token_id,
        },
        "backbone_weights": "the checkpoint's" if backbone else "not in the checkpoint; given",
        "imported_from": checkpoint.name,
        "checkpoint_sha256": contents.sha256_of(checkpoint),
    }


def _check(folder: Path, read: Callable[[str], Iterator[Tensor]], dtype: torch.dtype) -> None:
    """Raise UserError unless the folder opens with the checkpoint's tensors, to the bit; note some of its scores."""
    model = PalForSequenceClassification.from_pretrained(folder, local_files_only=True)
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor.flatten(), torch.cat(list(read(name))).to(dtype)):
            raise UserError(
                f"{name} of the folder is not the checkpoint's: nothing was written. Please report this."
            )
    add_probe(folder, probe_of(model.eval(), exact=dtype == torch.float32))


def _backbone_config(path: Path, hidden_size: int) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--backbone {path}: cannot be opened ({str(error).strip().splitlines()[0]}). Give the folder "
            "that the reference's llm_name was downloaded to."
        ) from None
    if hidden_size_of(config) != hidden_size:
        raise UserError(
            f"--backbone {path}: its hidden states are {hidden_size_of(config)} wide, the checkpoint's head reads "
            f"{hidden_size}. Give the backbone that it was trained with."
        )
    config._name_or_path = ""
    config.use_cache = False
    return config


def _weights(backbone: dict[str, Tensor], path: Path, head: Head) -> Weights:
    """Return the checkpoint's backbone, or that of the folder where the checkpoint has none."""
    if not backbone:
        with refusing_pickles(path):
            model = AutoModel.from_pretrained(path, dtype=torch.float32, trust_remote_code=False)
        backbone = model.state_dict()
    tensors = {
        name: tensor
        for name, tensor in backbone.items()
        # The pooler of BERT-like models is read by no score.
        if name.rpartition(".")[2] not in _COMPUTED and not name.startswith("pooler.")
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return Weights(shapes, lambda name: iter([tensors[name].flatten()]), head)
