"""Length of texts against the positions of the backbone, known before anything is prepared."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from pal_ds.config.run_config import RunConfig
from pal_ds.data.prepare import DEFAULT_MAX_LENGTH, DataConfig
from pal_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


def num_positions(model_config: "PretrainedConfig") -> int | None:
    """Return how many tokens the backbone reads at most; None where its config names no limit."""
    positions = getattr(model_config, "max_position_embeddings", None)
    if positions is not None and model_config.model_type in ("roberta", "xlm-roberta"):
        # Their positions start behind the pad id's own.
        positions -= model_config.pad_token_id + 1
    return positions


def data_to_prepare(config: RunConfig) -> DataConfig:
    """Return the recipe's `data` with the length of texts that its backbone reads.

    Where the backbone's config is not at hand, the length is left as it is: `train` compares it with the data.

    Raises:
        UserError: `data.max_length` is more than the backbone has positions for.
    """
    data = config.data
    if data.source is None:
        return data
    positions = _positions_of_backbone(config)
    if positions is None:
        return data
    if data.max_length is not None:
        check_length(data.max_length, positions)
    return replace(data, max_length=length_of_texts(data, positions))


def length_of_texts(data: DataConfig, positions: int | None) -> int:
    """Return `data.max_length`, or what stands for it where it is not given."""
    return data.max_length or min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)


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
        logger.info("data.max_length was not compared with the backbone: %s", error)
        return None
