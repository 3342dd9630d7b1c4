"""A trained run back in memory as a plain torch model: one process, no DeepSpeed.

What `evaluate`, `adapt`, `score` and the export stand on.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from pal_ds.backbones.given import DeferredBackbone
from pal_ds.backbones.language import STATE_PREFIX
from pal_ds.backbones.loading import empty_transformer
from pal_ds.backbones.transformer import TransformerBackbone
from pal_ds.config.recipe import load_recipe
from pal_ds.config.run_config import RunConfig, TrainConfig
from pal_ds.data.tables import PreparedData
from pal_ds.data.verification import verify_tokenizer
from pal_ds.engine.checkpoint.checkpoint import refuse_other_base
from pal_ds.engine.checkpoint.manifest import Manifest
from pal_ds.engine.checkpoint.shard_reader import ShardedCheckpoint
from pal_ds.engine.checkpoint.torch_archive import ForeignObjectError
from pal_ds.engine.checkpoint.verify import (
    UntrustedCheckpointError,
    refuse_strangers_run,
    verify_checkpoint,
)
from pal_ds.errors import UserError
from pal_ds.heads.base import Head
from pal_ds.inference.fitted_to import FittedTo, head_hash, refuse_other_table
from pal_ds.io.yaml_files import read_yaml
from pal_ds.model import RewardModel
from pal_ds.modeling.build import Parts, assemble, base_weights_of, load_backbone
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.tie_models import TieThreshold
from pal_ds.users import UserTable
from pal_ds.users.row_prior import SCALAR_STD


@dataclass(frozen=True)
class OpenRun:
    """A run at one step; `open_run` leaves the model's weights in the checkpoint, `restore` loads them."""

    run: RunDirectory
    config: RunConfig
    data: PreparedData
    parts: Parts
    users: UserTable
    step: int
    manifest: Manifest
    checkpoint: ShardedCheckpoint
    loaded: RewardModel | None = None
    """The model in eval mode; None where nobody asked for it."""

    @property
    def model(self) -> RewardModel:
        assert self.loaded is not None, "this run was opened without its weights; use `restore`"
        return self.loaded

    @property
    def reliability_variance(self) -> float | None:
        """Variance of the log of users' reliability under the run's prior; None where users have none."""
        if not self.users.has_reliability:
            return None
        fixed, learnt = SCALAR_STD**2, self.manifest.get("users_prior")
        return fixed if learnt is None else learnt.get("reliability_variance", fixed)

    def fitted_to(self, head: Head) -> FittedTo:
        """The record of users who are fitted to this run; `head` is its own, with the trained weights."""
        return {"run": self.run.path.resolve().name, "step": self.step, "head": head_hash(head)}

    def refuse_other_table(self, users: Path | None, head: Head) -> None:
        """Raise UserError where the users in a folder were fitted to another model than this; None is no folder."""
        if users is not None:
            adapt_to = f"--run_dir {self.run.path} --step {self.step}"
            refuse_other_table(users, self.fitted_to(head), adapt_to=adapt_to)


def limits_of(run: RunDirectory) -> TrainConfig:
    """Return `train.timeout_minutes` and `train.hang_minutes` of a run's recipe, all else as by default.

    For ranks that have not met yet. A recipe that cannot be read gives the defaults: `open_run` says what is wrong with
    it, to ranks that have met and end together.
    """
    names = ("timeout_minutes", "hang_minutes")
    try:
        train = read_yaml(run.config_file).get("train", {})
        return TrainConfig(**{name: train[name] for name in names if name in train})
    except (UserError, TypeError):
        return TrainConfig()


def open_run(
    run: RunDirectory,
    step: str | int = "latest",
    *,
    trust: bool = False,
    trust_code: bool = False,
    data_path: str | Path | None = None,
) -> OpenRun:
    """Opens a verified checkpoint of a run without reading its weights.

    `trust` reads a run that belongs to another user of the machine, or that anyone may write to; `trust_code` imports
    the classes that it names beyond pal_ds's own; `data_path` is where the prepared data lie now, unset where the
    recipe says.

    Raises:
        UntrustedCheckpointError: others may have written something of the run, without `trust`.
        UserError: no such run or step, a run that asks for code without `trust_code`, a damaged checkpoint, or data
            that are gone or not those of the training.
    """
    run.require_run()
    if not trust:
        refuse_strangers_run(run)
    config = load_recipe(run.config_file, trust_code=trust_code)
    number = run.resolve_step(str(step))
    path = run.checkpoint(number)
    if not (path / "manifest.json").is_file():
        raise UserError(f"{path}: no such checkpoint; there are {run.complete_steps()}.")
    try:
        manifest = verify_checkpoint(path, trust=trust)
    except (UntrustedCheckpointError, ForeignObjectError):
        raise
    except UserError as error:
        others = [step for step in run.complete_steps() if step != number]
        raise UserError(f"{error} Pass another as --step; there are {others}.") from None
    data_path = Path(config.data.path if data_path is None else data_path)
    if not data_path.is_dir():
        raise UserError(
            f"{run.config_file}: data.path is {data_path}, and no such folder is here. A run reads its tokenizer and "
            "token ids from the prepared data: bring the folder back, or mend data.path in that file."
        )
    data = PreparedData.open(data_path)
    if manifest["dataset_hash"] != data.hash:
        raise UserError(
            f"{path}: trained on data with hash {manifest['dataset_hash']}, {data.path} has "
            f"{data.hash}. Point data.path at the data it was trained on."
        )
    verify_tokenizer(data.path, data.info)
    parts = assemble(config, data, run)
    refuse_other_base(path, manifest, base_weights_of(parts))
    users = UserTable.load(path, config.users)
    return OpenRun(
        run=run,
        config=config,
        data=data,
        parts=parts,
        users=users,
        step=number,
        manifest=manifest,
        checkpoint=ShardedCheckpoint(path),
    )


def restore(
    run: RunDirectory,
    step: str | int = "latest",
    device: torch.device | str = "cpu",
    *,
    trust: bool = False,
    trust_code: bool = False,
) -> OpenRun:
    """A run's reward model at `step` on `device`, eval mode, no gradients asked for.

    fp32 holds the engine's master weights to the bit. Weights are read tensor by tensor, so the
    peak is one model. Raises UserError as `open_run` does, and where the checkpoint's tensors are
    not those of the model that the recipe describes.
    """
    return with_weights(open_run(run, step, trust=trust, trust_code=trust_code), device)


def with_weights(opened: OpenRun, device: torch.device | str) -> OpenRun:
    """An open run with its reward model on `device`, as `restore` has it."""
    # A full cache makes the weights of a frozen backbone superfluous.
    defer = opened.config.backbone.cache is not None and opened.parts.needs_store
    model = load_model(opened, defer_backbone=defer).to(device)
    return replace(opened, loaded=model)


def load_model(opened: OpenRun, *, defer_backbone: bool = False) -> RewardModel:
    """The RewardModel of an open run with its trained weights in fp32, on the CPU.

    `defer_backbone`: a frozen backbone is read at its first forward.
    """
    config = replace(opened.config, train=replace(opened.config.train, precision="fp32"))
    parts = opened.parts
    if parts.backbone is not None:
        # An attention asked for in training may need the training's GPU and dtype.
        parts = replace(parts, backbone=replace(parts.backbone, attention="auto"))
    if parts.backbone is not None and parts.backbone.tuning == "full":
        # Every weight comes from the checkpoint: no need to read those that training began with.
        empty = empty_transformer(parts.backbone, "fp32", packed=parts.collator.packed)
        backbone: nn.Module = TransformerBackbone(
            empty, pooling=parts.pooling, prompt_tokens=parts.prompt_tokens
        )
    elif defer_backbone:
        backbone = DeferredBackbone(lambda: load_backbone(parts, config, gpu=False))
    else:
        backbone = load_backbone(parts, config, gpu=False)
    threshold = TieThreshold() if config.loss.has_threshold else None
    model = RewardModel(backbone, opened.parts.head.float(), tie_threshold=threshold)
    _load_weights(model, opened.checkpoint)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _load_weights(model: RewardModel, checkpoint: ShardedCheckpoint) -> None:
    """Copies every tensor of the checkpoint; all that was trained must be there, and nothing else.

    Raises:
        UserError: names or shapes differ.
    """
    own = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    if missing := sorted(trained - set(checkpoint.names)):
        raise UserError(
            f"{checkpoint.path}: has no {missing[0]} ({len(missing)} of {len(trained)} tensors "
            "missing): config.yaml of the run describes another model than was trained."
        )
    for name in checkpoint.names:
        if name.startswith(STATE_PREFIX):
            continue  # what made text more likely in training, and no score reads
        if name not in own:
            raise UserError(
                f"{checkpoint.path}: {name} is no tensor of the model that config.yaml describes."
            )
        if tuple(own[name].shape) != checkpoint.shape(name):
            raise UserError(
                f"{checkpoint.path}: {name} is {checkpoint.shape(name)}, the model that "
                f"config.yaml describes has {tuple(own[name].shape)}."
            )
        own[name].copy_(checkpoint.tensor(name))


@torch.no_grad()
def trained_head(opened: OpenRun) -> Head:
    """Return the head of an open run with its trained weights, in eval mode, without reading the backbone's.

    What a head makes of users may depend on them: a temperature that it learnt, say.

    Raises:
        UserError: they do not fit.
    """
    head = opened.parts.head
    for name, tensor in head.state_dict().items():
        full = f"head.{name}"
        if full not in opened.checkpoint or opened.checkpoint.shape(full) != tuple(tensor.shape):
            raise UserError(
                f"{opened.checkpoint.path}: {full} is missing or has another shape than "
                "config.yaml of the run describes."
            )
        tensor.copy_(opened.checkpoint.tensor(full))
    return head.eval().requires_grad_(False)
