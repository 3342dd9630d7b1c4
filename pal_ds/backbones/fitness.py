"""Which models can be a backbone, by their config alone: it is known before anything is prepared."""

import difflib
from pathlib import Path

from transformers import CONFIG_MAPPING, MODEL_MAPPING, PretrainedConfig

from pal_ds.errors import UserError
from pal_ds.io.boundary import reading
from pal_ds.io.text_files import parse_json

_RULE = "A backbone is a decoder (llama, qwen3, ...) or an encoder (bert, ...) that gives each token of a text a state"


def refuse_unfit(
    key: str, whole: PretrainedConfig, text: PretrainedConfig, *, own_code: bool = False
) -> None:
    """Raise UserError where a model of these configs is no decoder or encoder of text.

    Args:
        key: what the recipe calls it.
        whole: config of the model.
        text: config of its text part, or `whole` again.
        own_code: the model may be one of its folder's own code, which no mapping lists.
    """
    named = f"{key}: {whole.model_type}"
    if any(getattr(config, "is_encoder_decoder", False) for config in (whole, text)):
        raise UserError(
            f"{named} is an encoder with a decoder behind it. {_RULE}; take one of the two kinds."
        )
    model = MODEL_MAPPING.get(type(text), None)
    if model is None:
        if own_code:
            return
        raise UserError(f"{named} is no model that transformers' AutoModel makes. {_RULE}.")
    reads = getattr(model, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise UserError(f"{named} reads {reads}, not token ids. {_RULE}.")


def refuse_type(where: str, model_type: str) -> None:
    """Raise UserError, with the nearest names, for a model_type that transformers does not know."""
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(model_type, list(CONFIG_MAPPING.keys()), n=3)
        raise UserError(
            f"{where}: model_type is {model_type}, which transformers does not know. "
            f"Give one that it does, such as {', '.join(near or ('llama', 'qwen3', 'bert'))}."
        )


def refuse_unknown_type(folder: Path) -> None:
    """Raise UserError where the config.json of a folder is damaged, or says no model_type that transformers knows."""
    file = folder / "config.json"
    if not file.is_file():
        return
    with reading(file, "config of a model", "Copy the folder again."):
        content = parse_json(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(content, dict) or "model_type" not in content:
        raise UserError(f"{file}: says no model_type, so it is no config of a model.")
    if "auto_map" not in content:
        refuse_type(str(file), str(content["model_type"]))
