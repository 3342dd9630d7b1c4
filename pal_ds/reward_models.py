"""A reward model from a run or an exported folder: a torch module that scores token ids.

The names that users of PAL know, `load_pal_rm_a` and `load_pal_rm_b`, check the kind and are
otherwise the same.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, AutoConfig, PreTrainedModel

from pal_ds.errors import UserError
from pal_ds.export.audience import choose_audience
from pal_ds.export.card import FACTS_NAME, FORMAT_VERSION
from pal_ds.export.configs import canonical_class, pal_config
from pal_ds.export.weights import plain_backbone
from pal_ds.inference.load_run import OpenRun, load_model, open_run
from pal_ds.remote_code.modeling_pal import PalForSequenceClassification
from pal_ds.runs.run_dir import RunDirectory


def load_reward_model(path: str | Path, mixture: Sequence[float] | None = None) -> PreTrainedModel:
    """A model in eval mode, on the CPU, in fp32 (an exported folder: in its own dtype).

    `model(input_ids, attention_mask).logits` are the scores [B, 1]; see PalForSequenceClassification.

    Args:
        path: a directory that `train` wrote, or a folder that `tools/consolidate.py` wrote. No code
            from the folder is run.
        mixture: another user than the folder's, or than a run's population.

    Raises:
        UserError: neither lies at `path`, or the mixture does not fit the head.
    """
    path = Path(path)
    if (path / FACTS_NAME).is_file():
        return _from_folder(path, mixture)
    if (path / "config.yaml").is_file():
        return model_of_run(open_run(RunDirectory(path)), mixture)
    raise UserError(
        f"{path}: holds neither a run (config.yaml) nor an exported model ({FACTS_NAME}). Give a "
        "directory that `train` or tools/consolidate.py wrote."
    )


def load_pal_rm_a(path: str | Path, mixture: Sequence[float] | None = None) -> PreTrainedModel:
    """The PAL-A model of a run or an exported folder; UserError where it is of another kind."""
    return _of_family("pal_a", path, mixture)


def load_pal_rm_b(path: str | Path, mixture: Sequence[float] | None = None) -> PreTrainedModel:
    """The PAL-B model of a run or an exported folder; UserError where it is of another kind."""
    return _of_family("pal_b", path, mixture)


def model_of_run(
    opened: OpenRun, mixture: Sequence[float] | None = None
) -> PalForSequenceClassification:
    """An open run's model as the exported class, in fp32, without writing anything."""
    model = load_model(opened)
    audience = choose_audience(model.head, opened.users, mixture=mixture)
    with torch.device("meta"):
        exported = PalForSequenceClassification(pal_config(opened, audience.mixture))
    exported.backbone = plain_backbone(model)
    exported.head = model.head
    return exported.eval().requires_grad_(False)


def read_facts(folder: Path) -> dict[str, Any]:
    """export.json of an exported folder, once its format is one we read."""
    facts = json.loads((folder / FACTS_NAME).read_text())
    if facts.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / FACTS_NAME}: format {facts.get('format_version')}, this version reads "
            f"{FORMAT_VERSION}. Export again."
        )
    return facts


def _from_folder(folder: Path, mixture: Sequence[float] | None) -> PreTrainedModel:
    facts = read_facts(folder)
    if facts["mixture"] is None and mixture is not None:
        raise UserError(
            f"{folder}: {facts['head']} has one reward for everyone: leave out mixture."
        )
    options: dict[str, Any] = {} if mixture is None else {"mixture": list(mixture)}
    cls: type[PreTrainedModel] = PalForSequenceClassification
    if facts["stock_class"]:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        stock: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)]
        cls = canonical_class(stock)
    try:
        return cls.from_pretrained(folder, local_files_only=True, **options).eval()
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None


def _of_family(family: str, path: str | Path, mixture: Sequence[float] | None) -> PreTrainedModel:
    model = load_reward_model(path, mixture)
    actual = getattr(getattr(model, "head", None), "family", "bradley_terry")
    if actual != family:
        raise UserError(
            f"{path}: holds a {actual} model, not {family}. load_reward_model takes any kind."
        )
    return model
