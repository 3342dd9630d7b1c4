"""The recipe: every key of a run, in one tree, grouped by what it may change.

Defaults < YAML < command line; unknown keys are errors. The resolved tree is written to the run directory and is
enough to run again.
"""

import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from pal_ds.backbones.config import BackboneConfig
from pal_ds.data.prepare import DataConfig
from pal_ds.errors import UserError
from pal_ds.heads.base import Head
from pal_ds.io.files import expand_home
from pal_ds.losses import PreferenceLoss
from pal_ds.users import UsersConfig


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW on everything but the users, whose rows have their own (see `users`)."""

    learning_rate: float = 1e-4
    """Peak rate of the head's projectors, and of whatever has no rate of its own below."""
    backbone_learning_rate: float | None = None
    """Peak rate of the backbone; unset: `learning_rate`."""
    prototype_learning_rate: float | None = None
    """Peak rate of the prototypes; unset: `learning_rate`."""
    scale_learning_rate: float | None = None
    """Peak rate of the learnt scale of cosine rewards, and of the threshold of ties; unset: `learning_rate`."""
    weight_decay: float = 0.0
    """Of AdamW, decoupled from the gradient; the cosine scale and the users have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of Adam's two moments."""
    epsilon: float = 1e-8
    """Added to the root of Adam's second moment."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of every rate after the warm-up: half a cosine down to `final_fraction`, or constant."""
    warmup_fraction: float = 0.05
    """Share of all updates over which every rate, the users' too, rises linearly from 0."""
    final_fraction: float = 0.1
    """Where the cosine ends, as a share of the full rate."""

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        parts = ("", "backbone_", "prototype_", "scale_")
        for name in (*(f"{part}learning_rate" for part in parts), "weight_decay"):
            value = getattr(self, name)
            check_range(f"optim.{name}", value, value is None or value >= 0, "0 or more")
        check_range("optim.epsilon", self.epsilon, self.epsilon > 0, "above 0")
        in_range = all(0 <= beta < 1 for beta in self.betas)
        check_range("optim.betas", self.betas, in_range, "at least 0 and below 1, both")
        for name in ("warmup_fraction", "final_fraction"):
            value = getattr(self, name)
            check_range(f"optim.{name}", value, 0 <= value <= 1, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Keys that say what an update is, how long to train, how it is executed and what is kept."""

    epochs: int = 1
    """Passes over the train split."""
    batch_pairs: int = 64
    """Comparisons per update, over all ranks."""
    shuffle_unit: Literal["comparison", "item"] = "comparison"
    """item: all annotations of one prompt stay adjacent, so each text is encoded once for all of them."""
    micro_batch_pairs: int = 16
    """Most comparisons per rank in one forward; execution only."""
    micro_batch_tokens: int | None = None
    """Most tokens per rank in one forward, of training and evaluation, for a backbone that is trained: distinct ones
    where rows are packed (see `backbone.packing`), with one more for every 12 of a prompt that a response looks at, as
    their keys and values are copied; padded ones of responses with their prompts elsewhere."""
    num_workers: int = 0
    """Processes per rank that build batches ahead of the updates; 0: the rank itself. Results do not depend on it."""
    feature_dropout: float = 0.0
    """Share of the numbers of each hidden state that the head does not see, in training; for any head."""
    gradient_clipping: float = 1.0
    """Global norm bound of the engine's gradients; 0 is off. User rows are outside it."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Dtype of forward and backward; the optimizer keeps fp32 weights, losses and softmax are fp32."""
    ds_config: str = "zero3"
    """A DeepSpeed JSON, or the name of one in ds_configs/."""
    seed: int = 0
    """Seed of initial weights, order of comparisons, dropout and noise."""
    init_from: str | None = None
    """Start from another run (its best step, else its latest) or an exported folder: its backbone, in place of
    `backbone.path`, with adapters merged; its head, where class and shapes are the same; its users by id. Read once:
    a resumed run has its own copy. The data must be prepared with its tokenizer."""
    eval_every: int = 0
    """Updates between evaluations on dev; 0: at the end of each epoch."""
    eval_at_start: bool = False
    """Also evaluate before the first update: what a stage begins with (step 0 of metrics.jsonl)."""
    eval_sets: dict[str, str] = field(default_factory=dict)
    """Other prepared data whose dev splits are scored at each evaluation, {name: DATA}, with this run's tokenizer:
    NAME_accuracy in metrics.jsonl beside dev_accuracy. They show what a stage keeps, and never decide what is best."""
    save_every: int = 0
    """Updates between checkpoints; 0: at the end of each epoch."""
    log_every: int = 10
    """Updates between two lines of metrics.jsonl."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep beside the best one; at least 2."""
    stop_after: int | None = None
    """Save and stop after this update, leaving schedules as they are: a later start resumes."""
    time_limit_minutes: float | None = None
    """Save and stop early enough to end within this time from the start of the process; a later start resumes."""
    stop_signals: tuple[str, ...] = ("USR2", "TERM")
    """Signals on which the ranks agree on an update, save and stop. NCCL versions have used USR1 themselves."""
    max_skips_in_a_row: int = 10
    """End the run when so many updates in a row had loss or gradients that were not finite (or spikes)."""
    skip_spikes_sigmas: float | None = None
    """Also skip updates whose loss or gradient norm exceeds the mean of the last 128 by so many deviations."""
    timeout_minutes: int = 30
    """How long a rank waits for the others before it gives up."""
    hang_minutes: float = 20
    """Minutes without progress of any rank after which the run ends with stacks dumped; 0: no watchdog at all."""

    def __post_init__(self) -> None:
        """Raises UserError for a value out of range."""
        expand_home(self, "init_from", "ds_config")
        counts = ("epochs", "batch_pairs", "micro_batch_pairs", "log_every", "timeout_minutes")
        for name in (*counts, "stop_after", "micro_batch_tokens", "max_skips_in_a_row"):
            value = getattr(self, name)
            check_range(f"train.{name}", value, value is None or value >= 1, "at least 1")
        for name in (
            "eval_every",
            "save_every",
            "gradient_clipping",
            "num_workers",
            "hang_minutes",
        ):
            value = getattr(self, name)
            check_range(f"train.{name}", value, value >= 0, "0 or more")
        share = self.feature_dropout
        check_range("train.feature_dropout", share, 0 <= share < 1, "at least 0 and below 1")
        workers = self.num_workers
        check_range(
            "train.num_workers", workers, workers <= MOST_WORKERS, f"{MOST_WORKERS} at most"
        )
        for name in ("time_limit_minutes", "skip_spikes_sigmas"):
            value = getattr(self, name)
            check_range(f"train.{name}", value, value is None or value > 0, "above 0")
        for name in self.eval_sets:
            # YAML takes no, on and off for truth values.
            plain = isinstance(name, str) and name.isidentifier() and name != "dev"
            check_range("train.eval_sets", name, plain, "names of letters, digits and _ but dev")
        for name in self.stop_signals:
            known = f"SIG{name}" in signal.Signals.__members__ and name not in ("KILL", "STOP")
            check_range("train.stop_signals", name, known, "a signal's name such as USR2 or TERM")


MOST_WORKERS = 1024
"""Processes that read batches for one rank; no machine has cores for more."""


def check_range(key: str, value: object, in_range: bool, rule: str) -> None:
    """Raises UserError unless `in_range`, and for what is infinite."""
    if not in_range:
        raise UserError(f"{key} is {value}; it must be {rule}.")
    if value in (math.inf, -math.inf):
        raise UserError(f"{key} is {value}; it must be finite.")


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Off unless a project is named; metrics.jsonl is always written."""

    project: str | None = None
    """Project in Weights & Biases; unset: nothing is sent."""
    name: str | None = None
    """Name of the run there; unset: one that W&B makes up."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """offline: keep the files here, for `wandb sync` later. Unset: what WANDB_MODE says, else online."""
    entity: str | None = None
    """User or team there; unset: the default one of the account."""
    group: str | None = None
    """Runs of one group are shown together."""
    tags: list[str] | None = None
    """Tags of the run there."""
    id: str | None = None
    """Id of the run there; unset: one that is made at the first start. A resumed run goes on under its id."""


@dataclass(frozen=True, kw_only=True)
class TrackersConfig:
    """Other places for the figures of metrics.jsonl."""

    csv: bool = False
    """Write RUN/metrics.csv."""
    tensorboard: bool = False
    """Write event files to RUN/tensorboard."""
    trackio: str | None = None
    """Project of trackio (pip install trackio)."""
    mlflow: str | None = None
    """Experiment of MLflow (pip install mlflow); MLFLOW_TRACKING_URI says where."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything `train` needs."""

    data: DataConfig
    head: Callable[[int], Head]
    """The method: {class_path: PalA, init_args: {num_prototypes: 3}}; the hidden size is filled in."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    loss: PreferenceLoss = field(default_factory=PreferenceLoss)
    users: UsersConfig = field(default_factory=UsersConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
    trackers: TrackersConfig = field(default_factory=TrackersConfig)


KEYS_THAT_DO_NOT_ALTER_RESULTS = (
    "data.path",
    "data.max_bad_rows",
    "wandb.",
    "trackers.",
    "train.eval_",
    "train.save_every",
    "train.log_every",
    "train.keep_checkpoints",
    "train.stop_after",
    "train.time_limit_minutes",
    "train.stop_signals",
    "train.num_workers",
    "train.max_skips_in_a_row",
    "train.timeout_minutes",
    "train.hang_minutes",
    "backbone.encode_batch_texts",
    "backbone.cache",
    "users.shard_rows_above",
)
"""A resumed run may change these freely; any other change is refused by name."""
