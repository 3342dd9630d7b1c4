"""Checks of which data, backbone, head and loss go together, and how a backbone then reads texts."""

import logging
from typing import TYPE_CHECKING, Literal, NoReturn

from pal_ds.backbones.config import BackboneConfig, Pooling
from pal_ds.config.run_config import RunConfig
from pal_ds.data.tables import PreparedData
from pal_ds.errors import UserError
from pal_ds.heads.base import Head
from pal_ds.modeling.lengths import check_length, num_positions

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


def encoding_of(wanted: str, encoder: bool, with_prompt: bool) -> Literal["joint", "separate"]:
    """Resolve `backbone.encoding`. Raises UserError for an encoder that shall read a prompt both ways."""
    if wanted == "auto":
        return "separate" if encoder and with_prompt else "joint"
    if wanted == "joint" and encoder and with_prompt:
        raise UserError(
            "backbone.encoding: joint with an encoder mean-pools prompt and response together, and this head reads "
            "the prompt by itself. Set it to separate (or auto)."
        )
    return "separate" if wanted == "separate" else "joint"


def pooling_of(wanted: str, encoder: bool, data: PreparedData) -> Pooling:
    """Resolve `backbone.pooling`. Raises UserError for a last token that an encoder or the data have not."""
    if wanted == "auto":
        return "mean" if encoder else "last"
    if wanted == "mean" or wanted == "max" or wanted == "mean_max":
        return wanted
    if encoder:
        raise UserError(
            f"backbone.pooling: {wanted}, and the last token of an encoder stands for nothing more than any other. Set "
            "it to mean (or auto), max or mean_max."
        )
    if wanted == "eos" and data.info["kind"] == "tokens" and not data.info["tokens"]["end_ids"]:
        raise UserError(
            f"backbone.pooling: eos, and {data.path} was prepared without an end token (data.special_tokens: false). "
            "Prepare with special_tokens: true, or set it to last."
        )
    return "last"


def is_packed(config: BackboneConfig, model_config: "PretrainedConfig") -> bool:
    """Return True where micro-batches are packed. Raises UserError where they shall be and cannot."""
    from pal_ds.backbones.packed import FAMILIES

    obstacle = None
    if config.trust_remote_code and getattr(model_config, "auto_map", None):
        obstacle = "code that comes with the weights may know nothing of packed rows"
    elif config.tuning == "frozen":
        obstacle = "a frozen backbone encodes each text by itself: stored states must not depend on neighbours"
    elif config.attention == "eager":
        obstacle = "attention: eager knows padded rows only"
    elif model_config.model_type not in FAMILIES:
        obstacle = f"{model_config.model_type} is not among the families it is known for: {', '.join(sorted(FAMILIES))}"
    if config.packing == "packed" and obstacle:
        raise UserError(f"backbone.packing: packed, but {obstacle}. Set it to auto or padded.")
    if config.packing == "auto" and obstacle:
        logger.info("packing: padded rows, as %s", obstacle)
    return config.packing != "padded" and obstacle is None


def check_head(data: PreparedData, head: Head) -> None:
    """Raise UserError where a head reads groups that the data have not, or prompts of which nobody knows the end."""
    if "group" in head.needs and not data.groups:
        raise UserError(
            f"head: {type(head).__name__} has one reward per group, and no comparison of {data.path} has a `group`. "
            "Give the records that key, or take another head."
        )
    if "group" in head.needs and len(data.groups) > head.num_prototypes:
        raise UserError(
            f"head.num_prototypes: {head.num_prototypes}, and the data have {len(data.groups)} groups "
            f"({', '.join(data.groups)}). Set it to {len(data.groups)}."
        )
    if "prompt" not in head.needs:
        return
    if data.info["kind"] == "vectors":
        if data.prompt_vectors is None:
            raise UserError(
                "head: it reads the prompt, and these vector records carry no prompt_features."
            )
    elif data.info["tokens"]["marker_ids"] is None:
        _refuse_without_marker(data)


def _refuse_without_marker(data: PreparedData) -> NoReturn:
    tokens = data.info["tokens"]
    if tokens["chat_template"]:
        share = tokens.get("marker_kept") or 0.0
        raise UserError(
            f"head: it reads the prompt, and only {share:.1%} of the conversations show by the chat template's "
            "assistant header where it ends (those whose turns alternate), so an exported model could not find it. "
            "Prepare without the others, or set data.chat_template: never."
        )
    raise UserError(
        f"head: it reads the prompt, and data.separator {tokens['separator']!r} leaves no token of "
        "its own, so an exported model could not find where the prompt ends. Prepare with a separator that does, "
        "such as ' [SEP] ' for BERT-like tokenizers or '\\n\\n### Response:\\n'."
    )


def check_scalars(config: RunConfig) -> None:
    """Raise UserError where users shall have a reliability and margins are no log-odds, or a threshold no tie has."""
    kind = config.loss.kind
    if config.users.has_reliability and kind != "logistic":
        raise UserError(
            f"users.reliability: learnt, and the loss is {kind}. A user's reliability is the temperature of log-odds, "
            "and only margins of the logistic loss are that. Set loss.kind to logistic, or users.reliability to none."
        )
    if "tie_threshold" in config.users.scalars and not config.loss.has_threshold:
        raise UserError(
            f"users.tie_threshold: learnt, and loss.ties is {config.loss.ties}, which has no threshold. Set "
            "loss.ties to davidson or rao_kupper, or users.tie_threshold to none."
        )


def check_language(
    config: RunConfig, model_config: "PretrainedConfig | None", encoding: str
) -> None:
    """Raise UserError where there is no language model to ask how likely the preferred response is."""
    if config.loss.lm_weight == 0:
        return
    from pal_ds.backbones.packed import DECODERS

    obstacle = None
    if model_config is None:
        obstacle = "vector data have no tokens. Set it to 0"
    elif config.backbone.tuning == "frozen":
        obstacle = "a frozen backbone cannot learn from it. Set backbone.tuning to full or lora, or it to 0"
    elif model_config.model_type not in DECODERS or config.backbone.trust_remote_code:
        known = ", ".join(sorted(DECODERS))
        obstacle = f"{model_config.model_type} is not among the decoders it is known for: {known}. Set it to 0"
    elif encoding == "separate":
        obstacle = "backbone.encoding: separate reads the response without its prompt. Set that to joint, or this to 0"
    if obstacle:
        raise UserError(f"loss.lm_weight: {obstacle}.")


def check_sizes(model_config: "PretrainedConfig", data: PreparedData) -> None:
    """Raise UserError where the data have ids that the backbone has no embedding for, or texts longer than it reads."""
    vocab_size = getattr(model_config, "vocab_size", None)
    needed = int(data.info["tokens"]["vocab_size"])
    if vocab_size is not None and vocab_size < needed:
        raise UserError(
            f"backbone.path: its vocabulary has {vocab_size} entries, the data's tokenizer has {needed}. "
            "Prepare the data with the backbone's own tokenizer (data.tokenizer). If it is that, with tokens added, "
            'give the model rows for them first, and the new folder as backbone.path: python -c "from transformers '
            f"import AutoModel; m = AutoModel.from_pretrained('MODEL'); m.resize_token_embeddings({needed}); "
            "m.save_pretrained('NEW')\"."
        )
    check_length(data.info["tokens"]["max_length"], num_positions(model_config))
