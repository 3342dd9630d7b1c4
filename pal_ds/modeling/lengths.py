"""Length of texts against the positions of the backbone, known before anything is prepared."""

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pal_ds.config.run_config import RunConfig
from pal_ds.data.prepare import DEFAULT_MAX_LENGTH, DataConfig
from pal_ds.data.tables import read_info
from pal_ds.errors import UserError
from pal_ds.io.boundary import reading
from pal_ds.io.yaml_files import flattened, read_yaml

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


def num_positions(model_config: "PretrainedConfig") -> int | None:
    """Return how many tokens the backbone reads at most; None where its config names no limit."""
    from pal_ds.remote_code.encoding import is_encoder

    text = model_config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and positions < 1:
        return None  # XLNet's way to say that there is no limit
    return _usable_positions(text) if positions and is_encoder(text) else positions


def _usable_positions(model_config: "PretrainedConfig") -> int:
    """Return the rows of a position embedding that a token may have.

    RoBERTa and its kin (MPNet, CamemBERT, Longformer, Data2Vec) count behind the row that they keep for padding. Which
    one that is, and which families do so, the model says: it is built without storage.
    """
    import torch
    from transformers import AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(copy.deepcopy(model_config))
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return len(module.get_parameter("weight")) - padding - 1
    return int(model_config.max_position_embeddings)


def data_to_prepare(config: RunConfig) -> DataConfig:
    """Return the recipe's `data` with the length of texts that its backbone reads.

    Where `train.init_from` is set and no length given, it is that of the origin's data. Where the backbone's config is
    not at hand, the length is left as it is: `train` compares it with the data.

    Raises:
        UserError: `data.max_length` is more than the backbone has positions for, or the backbone can be none; the
            origin does not tell its length of texts.
    """
    data = config.data
    if data.source is None:
        return data
    if data.max_length is None and config.train.init_from is not None:
        data = replace(data, max_length=length_of_origin(Path(config.train.init_from)))
    positions = _positions_of_backbone(config)
    if positions is None:
        return data
    if data.max_length is not None:
        check_length(data.max_length, positions)
    return replace(data, max_length=length_of_texts(data, positions))


def length_of_origin(origin: Path) -> int | None:
    """Return the `max_length` of the data behind a run directory, or behind an exported folder.

    None where they are vectors, or where the folder is neither: `open_origin` tells of that.

    Raises:
        UserError: the run's recipe or data, or the folder's export.json, cannot be read.
    """
    recipe, facts = origin / "config.yaml", origin / "export.json"
    if recipe.is_file():
        tokens = read_info(Path(str(flattened(read_yaml(recipe)).get("data.path"))))["tokens"]
        return tokens["max_length"] if tokens else None
    if not facts.is_file():
        return None
    with reading(facts, "listing of an exported folder", "Copy the folder again, or export again."):
        return int(json.loads(facts.read_bytes())["tokens"]["max_length"])


def length_of_texts(data: DataConfig, positions: int | None) -> int:
    """Return `data.max_length`, or what stands for it where it is not given."""
    if data.max_length is not None:
        return data.max_length
    return DEFAULT_MAX_LENGTH if positions is None else min(DEFAULT_MAX_LENGTH, positions)


def check_length(max_length: int, positions: int | None) -> None:
    """Raise UserError where texts are longer than the backbone reads."""
    if positions is not None and max_length > positions:
        raise UserError(
            f"data.max_length: {max_length}, and the backbone has {positions} positions. Set it to {positions} or "
            "less, or leave it out; `pal-ds prepare --prepare_again` then replaces data that were prepared before."
        )


def _positions_of_backbone(config: RunConfig) -> int | None:
    from pal_ds.backbones.transformer import architecture_config, read_model_config

    backbone = config.backbone
    if backbone.path is None and backbone.architecture is None:
        return None
    try:
        if backbone.path is None:
            return num_positions(architecture_config(backbone, config.data.vocab_size))
        # The hub is asked only where its tokenizer will be asked for, too.
        from_disk_only = backbone.path != config.data.tokenizer
        return num_positions(read_model_config(backbone, from_disk_only=from_disk_only))
    except UserError as error:
        if backbone.path is None or Path(backbone.path, "config.json").is_file():
            raise
        logger.info("data.max_length was not compared with the backbone: %s", error)
        return None
