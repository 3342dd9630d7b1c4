"""Assembly of a recipe's parts: which texts are read how, the backbone, the head, the collator; and their context.

Everything that depends on what meets what (encoder and weighting, head and prompt, vectors and backbone) is decided
and refused here, once, before any engine starts.
"""

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from pal_ds.backbones.config import BackboneConfig, Pooling
from pal_ds.backbones.given import GivenStates
from pal_ds.config.run_config import RunConfig
from pal_ds.data.collator import Collator
from pal_ds.data.draws import Contexts
from pal_ds.data.tables import PreparedData, preferences
from pal_ds.distributed.world import World
from pal_ds.engine.ds_config import DeepSpeedConfig, ds_config_of
from pal_ds.errors import UserError
from pal_ds.heads.base import Head
from pal_ds.modeling.combination_checks import (
    check_head,
    check_language,
    check_scalars,
    check_sizes,
    encoding_of,
    is_packed,
    pooling_of,
)
from pal_ds.modeling.own_classes import naming_place, try_head, try_loss
from pal_ds.runs.run_dir import RunDirectory

if TYPE_CHECKING:
    from transformers import PretrainedConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
    """The fixed surroundings of a training; nothing in it changes while the training goes on."""

    config: RunConfig
    run: RunDirectory
    data: PreparedData
    world: World
    ds_config: DeepSpeedConfig
    """DeepSpeed's JSON for this recipe and world size."""

    @staticmethod
    def of(config: RunConfig, run: RunDirectory, data: PreparedData, world: World) -> "RunContext":
        """Return the context with the DeepSpeed settings that the recipe asks for.

        Raises:
            UserError: the recipe and its DeepSpeed JSON contradict each other.
        """
        ds_config = ds_config_of(config.train, world.world_size)
        return RunContext(config=config, run=run, data=data, world=world, ds_config=ds_config)


@dataclass(frozen=True)
class Parts:
    """The parts that a run is made of, before weights are loaded."""

    head: Head
    collator: Collator
    backbone: BackboneConfig | None
    """The backbone, with `path` set; None for vector data."""
    pooling: Pooling
    prompt_tokens: bool

    @property
    def needs_users(self) -> bool:
        return "logits" in self.head.needs

    @property
    def needs_store(self) -> bool:
        """True where each distinct text is encoded once, ahead of training."""
        return self.backbone is not None and self.backbone.tuning == "frozen"


def assemble(
    config: RunConfig,
    data: PreparedData,
    run: RunDirectory,
    *,
    model_config: "PretrainedConfig | None" = None,
) -> Parts:
    """Check how data, backbone, head and loss fit together, and build the head (fp32, seeded).

    `model_config` is the backbone's where `train.init_from` gives one that is not written yet; `path` stays unset then.

    Raises:
        UserError: two keys contradict each other, or the data lack what the head reads.
    """
    encoder = packed = False
    backbone = None
    if data.info["kind"] == "vectors":
        state_size = int(data.info["vector_size"])
        pooling = pooling_of(config.backbone.pooling, encoder, data)
    else:
        from pal_ds.remote_code.encoding import is_encoder, state_size_of

        backbone, model_config = _describe_backbone(config, data, run, model_config)
        encoder = is_encoder(model_config)
        pooling = pooling_of(config.backbone.pooling, encoder, data)
        state_size = state_size_of(model_config, pooling)
        check_sizes(model_config, data)
        packed = is_packed(config.backbone, model_config)
    weighting, head = config.loss.token_weighting, _head_of(config, state_size)
    with_prompt = "prompt" in head.needs
    encoding = encoding_of(config.backbone.encoding, encoder, with_prompt)
    if weighting != "last" and (pooling != "last" or backbone is None):
        reason = "vector data have one vector per response"
        if backbone is not None:
            reason = f"{'an encoder is' if encoder else 'backbone.pooling:'} {pooling}"
            reason += "-pooled" if encoder else " gives one for all of them"
        raise UserError(
            f"loss.token_weighting: {weighting} needs a score per response token; {reason}. Set it to last."
        )
    check_head(data, head)
    check_scalars(config)
    check_language(config, model_config, encoding)
    collator = Collator(
        data,
        scored_positions="last" if weighting == "last" else "all",
        encoding=encoding,
        with_prompt=with_prompt,
        packed=packed,
        pooled=encoder,
        with_answers=config.loss.lm_weight > 0,
        pad_token_id=0 if backbone is None else int(data.info["tokens"]["pad_token_id"]),
        contexts=_contexts(config, data, head, backbone),
    )
    refuse_empty_prompts(collator, data.path)
    return Parts(head, collator, backbone, pooling, prompt_tokens="prompt_tokens" in head.needs)


def _head_of(config: RunConfig, hidden_size: int) -> Head:
    """Make the head, seeded. Raises UserError where it, or an own loss, breaks the contract of its kind."""
    with torch.random.fork_rng(devices=[]):
        # A stream of its own: a backbone's random initialisation does not shift it.
        torch.manual_seed(config.train.seed + 1)
        try:
            with naming_place("head: its constructor", None):
                head = config.head(hidden_size)
        except UserError as error:
            if isinstance(error.__cause__, ValueError | TypeError):
                raise UserError(f"head: {error.__cause__}") from None
            raise
        except (ValueError, TypeError) as error:
            raise UserError(f"head: {error}") from None
    try_head(head, hidden_size, 1 if config.loss.token_weighting == "last" else 3)
    try_loss(config.loss.shape)
    return head


def _describe_backbone(
    config: RunConfig,
    data: PreparedData,
    run: RunDirectory,
    model_config: "PretrainedConfig | None",
) -> tuple[BackboneConfig, "PretrainedConfig"]:
    """Return (the backbone with its path, its transformers config, which is `model_config` where one is given)."""
    from pal_ds.backbones.transformer import architecture_config, read_model_config

    backbone = config.backbone
    given = [key for key in ("path", "architecture") if getattr(backbone, key) is not None]
    if config.train.init_from is not None and given:
        raise UserError(
            f"backbone.{given[0]}: train.init_from gives the backbone. Set backbone.{given[0]} to null, or leave out "
            "train.init_from."
        )
    if config.train.init_from is None and len(given) != 1:
        raise UserError(
            "backbone: give exactly one of path (weights to load) and architecture (random weights)."
        )
    if backbone.num_layers is not None and backbone.architecture is not None:
        raise UserError(
            "backbone.num_layers: backbone.architecture says how many layers it has (num_hidden_layers). Leave "
            "num_layers out."
        )
    if model_config is not None:
        return backbone, model_config
    resolved = resolve_backbone_path(config, run)
    if backbone.architecture is None:
        return resolved, read_model_config(resolved)
    return resolved, architecture_config(resolved, int(data.info["tokens"]["vocab_size"]))


def _contexts(
    config: RunConfig, data: PreparedData, head: Head, backbone: BackboneConfig | None
) -> Contexts | None:
    """Return the contexts, drawn from train but for its ties, of a head that reads other comparisons of a user."""
    if "context" not in head.needs:
        return None
    trained = backbone is not None and backbone.tuning != "frozen"
    if trained and config.train.micro_batch_tokens is not None:
        raise UserError(
            "train.micro_batch_tokens: a budget counts the texts of comparisons, and this head reads those of "
            f"{head.num_context} others for each. Unset it; train.micro_batch_pairs bounds a micro-batch."
        )
    rows = data.rows("train")
    return Contexts.of(data, rows[preferences(data.comparisons[rows]) != 0], config.train.seed)


def refuse_empty_prompts(collator: Collator, where: object) -> None:
    """Raise UserError where a prompt that is read by itself has no token: nothing could stand for it."""
    prompts = collator.data.prompts
    if prompts is None or not collator.with_prompt or collator.encoding == "joint":
        return
    num_empty = int((prompts.lengths == 0).sum())
    if num_empty:
        raise UserError(
            f"{where}: {num_empty} of {len(prompts)} prompts have no token, and the head reads each by itself "
            "(backbone.encoding: separate). Give every record a prompt; a decoder may also use joint encoding."
        )


def resolve_backbone_path(config: RunConfig, run: RunDirectory) -> BackboneConfig:
    """`path` as given, or a folder of the run for one built from `architecture` or begun with `train.init_from`."""
    path = config.backbone.path
    if config.backbone.architecture is not None:
        path = str(run.base)
    elif config.train.init_from is not None:
        path = run.initial_backbone()
    return replace(config.backbone, path=path)


def base_weights_of(parts: Parts) -> str | None:
    """Return the fingerprint of the weights that training leaves as they are; None where there are none."""
    if parts.backbone is None or parts.backbone.tuning == "full":
        return None
    from pal_ds.backbones.loading import weights_fingerprint
    from pal_ds.backbones.transformer import read_model_config

    assert parts.backbone.path is not None, "materialise `backbone.architecture` first"
    revision = getattr(read_model_config(parts.backbone), "_commit_hash", None)
    return weights_fingerprint(parts.backbone.path, revision)


def load_backbone(
    parts: Parts, config: RunConfig, *, gpu: bool, language: bool = False
) -> nn.Module:
    """Return given states for vector data, else a transformers model loaded for its tuning.

    `language`: with the output layer that `loss.lm_weight` asks for; training alone reads it.
    """
    if parts.backbone is None:
        return GivenStates()
    from pal_ds.backbones.loading import load_transformer
    from pal_ds.backbones.packed import choose_layout, drops_attention
    from pal_ds.backbones.transformer import TransformerBackbone
    from pal_ds.remote_code.encoding import is_encoder

    packed, precision = parts.collator.packed, config.train.precision
    seed = config.train.seed
    model, output = load_transformer(
        parts.backbone, precision=precision, seed=seed, gpu=gpu, packed=packed, language=language
    )
    layout = None
    if packed:
        causal, dropout = not is_encoder(model.config), drops_attention(model.config)
        layout, reason = choose_layout(
            parts.backbone.attention, precision, gpu=gpu, causal=causal, dropout=dropout
        )
        logger.info("packed rows: %s", reason)
    return TransformerBackbone(
        model,
        pooling=parts.pooling,
        prompt_tokens=parts.prompt_tokens,
        layout=layout,
        language=output,
    )
