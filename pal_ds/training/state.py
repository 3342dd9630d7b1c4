"""The state of a training while it runs: model, users, data, plan and progress."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch

from pal_ds.config.run_config import RunConfig
from pal_ds.data.collator import Collator
from pal_ds.data.draws import Draws
from pal_ds.data.loader import UpdateSource
from pal_ds.data.plan import UpdatePlan
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.preemption import StopWatch
from pal_ds.distributed.world import World
from pal_ds.engine.guard import UpdateGuard
from pal_ds.engine.step import Stepper
from pal_ds.engine.training_engine import TrainingEngine
from pal_ds.errors import UserError
from pal_ds.heads.base import Head
from pal_ds.modeling.build import Parts, RunContext
from pal_ds.runs.run_dir import BestEvaluation, OriginFacts, RunDirectory
from pal_ds.training.metrics_logger import MetricsLogger
from pal_ds.users import RowPrior, RowPriorState, Shard, TrainedUsers, trained_users
from pal_ds.users.ids import POPULATION_USER, UserIds, generic_row_of
from pal_ds.users.row_prior import basis_of, no_basis


@dataclass(frozen=True)
class EvalSet:
    """Comparisons that are scored beside the run's own."""

    name: str
    collator: Collator
    """Collator of the set's data, with the run's table row of each of its users, -1 for strangers."""
    rows: np.ndarray


@dataclass
class Training:
    """A run in memory: what the loop drives."""

    context: RunContext
    parts: Parts
    collator: Collator
    engine: TrainingEngine
    users: TrainedUsers
    plan: UpdatePlan
    guard: UpdateGuard
    watch: StopWatch
    metrics: MetricsLogger
    prior: RowPrior | None = None
    """Prior of the table's rows, where the recipe has one."""
    step: int = 0
    best: BestEvaluation | None = None
    """Step and accuracy of the best dev evaluation so far."""
    eval_sets: list[EvalSet] = field(default_factory=list)
    """Sets that are scored beside dev at each evaluation."""
    origin: OriginFacts | None = None
    """Origin of a run with `train.init_from`."""
    base_weights: str | None = None
    """Fingerprint of the frozen weights, which no checkpoint holds; None where all weights are trained."""
    owes_evaluation: bool = False
    """True where a stop on request left out an evaluation that was due at `step`."""
    owes_save: bool = False
    """True where a checkpoint that was due waits for the end of a row of skipped updates."""

    @property
    def config(self) -> RunConfig:
        return self.context.config

    @property
    def run(self) -> RunDirectory:
        return self.context.run

    @property
    def data(self) -> PreparedData:
        return self.context.data

    @property
    def world(self) -> World:
        return self.context.world

    @property
    def num_updates(self) -> int:
        return self.config.train.epochs * self.plan.updates_per_epoch

    @property
    def learns_prior(self) -> bool:
        """True where the prior of rows is learnt; one of scalars alone may be fixed."""
        return self.config.users.prior == "learnt"

    @property
    def learnt_prior(self) -> RowPriorState | None:
        """The prior that a resumed run goes on with; None where it has none, or a fixed one."""
        return self.prior.state_dict() if self.prior is not None and self.learns_prior else None

    def due(self, every: int, step: int | None = None) -> bool:
        """Return True where `step` (the update just made) closes an interval of `every` updates; 0 means an epoch."""
        step = self.step if step is None else step
        return step % (every or self.plan.updates_per_epoch) == 0 or step == self.num_updates

    @property
    def inputs(self) -> UpdateSource:
        """The source of this rank's updates."""
        settings, head = self.config.train, self.parts.head
        return UpdateSource(
            self.plan,
            self.collator,
            self.world.rank,
            self.world.world_size,
            settings.micro_batch_pairs,
            settings.micro_batch_tokens,
            Draws(
                settings.seed,
                head.num_prototypes,
                head.needs & {"gumbel", "normal"},
                head.num_context,
            ),
            self.config.users.generic_fraction,
        )

    @property
    def stepper(self) -> Stepper:
        """The object that makes an update from its inputs."""
        return Stepper(
            engine=self.engine,
            users=self.users,
            loss=self.config.loss,
            optim=self.config.optim,
            users_learning_rate=self.config.users.learning_rate,
            world=self.world,
            num_updates=self.num_updates,
            seed=self.config.train.seed,
            needs_users=self.parts.needs_users,
            guard=self.guard,
            prior=self.prior,
        )


def plan_of(config: RunConfig, data: PreparedData) -> UpdatePlan:
    """Return which comparisons form which update. Raises UserError where the train split has nothing to learn from."""
    rows, settings = data.rows("train"), config.train
    if len(rows) == 0:
        raise UserError(
            f"{data.path}: its train split is empty. Prepare with smaller dev and test fractions."
        )
    if config.loss.ties == "drop" and not data.comparisons["label"][rows].any():
        raise UserError(
            f"{data.path}: all comparisons of its train split are ties, which loss.ties: drop leaves out: nothing is "
            "left to learn from. Set loss.ties to half, rao_kupper or davidson."
        )
    items = data.response_prompt[data.comparisons["a"][rows]]
    return UpdatePlan(
        rows, items, settings.batch_pairs, settings.seed, data.hash, settings.shuffle_unit
    )


def ids_of_table(config: RunConfig, data: PreparedData) -> UserIds:
    """Return the ids that have a row, in order: the users who may be trained on, and behind them the generic one.

    The latter where a share of the training is asked for this user, who may be among the former.
    """
    ids = UserIds.of(data.users).take(np.flatnonzero(data.user_seen))
    if config.users.generic_fraction > 0 and POPULATION_USER not in ids:
        ids = ids.joined(UserIds.of([POPULATION_USER]))
    return ids


def seen_users(
    config: RunConfig, data: PreparedData, head: Head, world: World
) -> tuple[TrainedUsers, np.ndarray, int]:
    """Return (fresh table of the users to train on, each data user's row in it (-1: held out), the generic user's row).

    The generic user is the one whom records without a user id name.
    """
    ids, users = ids_of_table(config, data), config.users
    table_rows = np.where(data.user_seen, np.cumsum(data.user_seen) - 1, -1)
    if "logits" not in head.needs:
        # Nobody trains these: they stand for users of whom nothing is known.
        users = replace(users, init_std=0.0)
    shard = Shard(world.rank, world.world_size, world.sum_integers)
    settings = (users, config.train.seed, world.device, shard)
    table = trained_users(head.num_prototypes, ids, *settings)
    return table, table_rows.astype(np.int64), generic_row_of(ids)


def prior_of_rows(
    config: RunConfig, data: PreparedData, head: Head, table_rows: np.ndarray, device: torch.device
) -> RowPrior | None:
    """The prior of the table's rows before the first update; None where the recipe or the head has none."""
    users, num_prototypes = config.users, head.num_prototypes
    of_logits = users.prior != "none" and "logits" in head.needs and num_prototypes > 1
    if not of_logits and not users.scalars:
        return None
    rows = table_rows[data.comparisons["user"][data.rows("train")]]
    count = np.bincount(rows[rows >= 0], minlength=len(ids_of_table(config, data)))
    basis = basis_of(num_prototypes, head.space) if of_logits else no_basis(num_prototypes)
    return RowPrior.fresh(count, basis, users.init_std, device, scalars=users.scalars)
