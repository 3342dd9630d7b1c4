"""An exported model under another version of transformers than its exporter's: refused where it would score otherwise.

Versions differ in the backbones that they know and in what they compute for one. An exported model folder carries this
code.
"""

import logging

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel

from .rows import pad_right

logger = logging.getLogger(__name__)

LARGEST_DIFFERENCE = 1e-4
"""In fp32, times the largest score where that is above 1."""
LARGEST_DIFFERENCE_IN_HALF = 5e-2


def known_config(text_config: dict, exported_with: str | None) -> PretrainedConfig:
    """A backbone's config of its dictionary; ValueError where this transformers knows no such backbone."""
    name = text_config.get("model_type")
    try:
        return AutoConfig.for_model(**text_config)
    except (KeyError, ValueError) as error:
        if name in CONFIG_MAPPING:
            raise
        raise ValueError(
            f"transformers {transformers.__version__} knows no backbone {name!r}. Open the model with "
            f"the version it was exported with ({exported_with or 'not stated'}) or a newer one."
        ) from error


def check_probe(model: PreTrainedModel) -> None:
    """Compare a loaded model's scores with those in its config's `probe`, unless the version is the exporter's own.

    `probe` holds {"transformers": its version, "exact": whether the weights are the trainer's to the last bit,
    "ids": token rows, "prompt_lengths": as the model takes them, or null, "scores", "mixture": the point that they are
    for, or null}.

    Raises:
        ValueError: a score differs by more than rounding explains.
    """
    probe = getattr(model.config, "probe", None)
    version = transformers.__version__
    if not probe or probe["transformers"] == version:
        return
    parameters = list(model.parameters())
    if any(p.is_meta or not p.numel() or not p.is_floating_point() for p in parameters):
        logger.warning(
            "this model was exported with transformers %s, and its scores under %s were not compared with the "
            "trainer's: its weights are quantised, or not all here",
            probe["transformers"],
            version,
        )
        return
    own = getattr(model.config, "mixture", None)
    ids, mask = pad_right(probe["ids"], model.config.get_text_config().pad_token_id, model.device)
    lengths = {} if probe["prompt_lengths"] is None else {"prompt_lengths": probe["prompt_lengths"]}
    try:
        if probe["mixture"] is not None:
            model.config.mixture = probe["mixture"]
        with torch.no_grad():
            scores = model(input_ids=ids, attention_mask=mask, **lengths).logits[:, 0].float().cpu()
    finally:
        if probe["mixture"] is not None:
            model.config.mixture = own
    expected = torch.tensor(probe["scores"])
    exact = probe["exact"] and all(p.dtype == torch.float32 for p in parameters)
    bound = LARGEST_DIFFERENCE if exact else LARGEST_DIFFERENCE_IN_HALF
    difference = float((scores - expected).abs().max())
    if not difference <= bound * max(1.0, float(expected.abs().max())):
        raise ValueError(
            f"transformers {version} computes other scores with this model than its trainer did, by {difference:.2g}: "
            f"{scores.tolist()} for {expected.tolist()}. Open it with transformers {probe['transformers']}, with which "
            "it was exported."
        )
