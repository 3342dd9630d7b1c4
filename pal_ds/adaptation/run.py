"""`adapt`: few-shot logits for the users of a file or a split, written as a user table with a report."""

import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import xxhash

from pal_ds.adaptation import new_users
from pal_ds.adaptation.fit import (
    Solver,
    UserPairs,
    UserPrior,
    fit_users,
    pairs_per_chunk,
    refuse_solver,
)
from pal_ds.adaptation.left_out import right_where_left_out
from pal_ds.adaptation.new_users import (
    FittedShard,
    NewUsers,
    ShardFolder,
    few_per_user,
    num_positions,
    warn_of_pairs,
)
from pal_ds.adaptation.prior import LogitPrior
from pal_ds.adaptation.result import (
    REPORT,
    AdaptReport,
    figures_of_fit,
    fitted_before,
    refuse_foreign,
)
from pal_ds.adaptation.run_users import prior_of
from pal_ds.adaptation.user_posteriors import (
    UserPosteriors,
    posterior_of_users,
    why_no_posterior,
)
from pal_ds.data.sources.base import Source
from pal_ds.data.tables import PreparedData, preferences
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.eval.evaluate import opened_pairs
from pal_ds.eval.metrics import correctness
from pal_ds.eval.results import write_user_figures
from pal_ds.heads.base import UserState
from pal_ds.heads.jaxtyping_fallback import Float
from pal_ds.inference.fitted_to import write_record
from pal_ds.inference.load_run import OpenRun, restore
from pal_ds.inference.mixtures import user_mixtures, widened
from pal_ds.inference.posterior_file import write_posterior
from pal_ds.inference.readers import Reader, reader_of
from pal_ds.inference.scoring import Forwards
from pal_ds.io.files import new_files
from pal_ds.progress import progress_bar
from pal_ds.runs.lock import LOCK, held
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable

logger = logging.getLogger(__name__)

SPLIT = "unseen_train"
"""Whose users are fitted where nobody is named."""
FIT_VERSION = 2
"""Counted up with every change that gives fits other numbers: a fit that an older program began is begun anew."""


@dataclass(frozen=True)
class AdaptOptions:
    """Options of `adapt_run`: whom it fits, from which comparisons, and how."""

    pairs: Path | Source | None = None
    """File or source of the new users' comparisons; None for a split of the run's data."""
    split: str | None = None
    """Split of the run's data without `pairs`; unset, `unseen_train`."""
    num_pairs: int | None = None
    """Comparisons to keep per user, drawn by (seed, user); None keeps all."""
    step: str = "latest"
    """A number, latest or best."""
    seed: int = 0
    solver: Solver = "auto"
    posterior: bool = True
    """Write the posterior of each user's point, where there is one, and what fits explain of pairs left out."""
    trust_checkpoint: bool = False
    """Read runs of another owner."""
    trust_code: bool = False
    """Import the classes that the run names beyond pal_ds's own."""


def adapt_run(run: RunDirectory, out: Path, options: AdaptOptions) -> AdaptReport:
    """Fit every user of a file or of a split of the run's data, write them to OUT, and return the report.

    Users are fitted in shards, each of which is kept in OUT/fitting until all are done: called again after it was
    cut off, this goes on, to the same bytes; and once all is there, it returns that.

    Raises:
        UserError: a head without users, or one that the solver cannot do; no such file or split, or no pairs in it.
    """
    if options.split is not None and options.pairs is not None:
        raise UserError("adapt: give --split, or --pairs in place of a split, not both.")
    if options.num_pairs is not None and options.num_pairs < 1:
        raise UserError(
            f"--num_pairs is {options.num_pairs}; it must be at least 1, or unset for all."
        )
    refuse_foreign(out)
    # A second command of this --out waits, and finds what this one made.
    with held(out / LOCK, out, "Start again later, or name another --out."):
        refuse_foreign(out)
        return _adapt(run, out, options)


def _adapt(run: RunDirectory, out: Path, options: AdaptOptions) -> AdaptReport:
    """Do what `adapt_run` says; nobody else writes to `out`."""
    pairs, num_pairs, solver, seed = options.pairs, options.num_pairs, options.solver, options.seed
    world = World(0, 1, torch.device("cpu"))
    split = options.split or SPLIT
    leave = {"trust": options.trust_checkpoint, "trust_code": options.trust_code}
    restored = restore(run, options.step, world.device, **leave)
    head = restored.model.head
    scores_by_user = restored.users.has_reliability and "group" not in head.needs
    if not (head.has_points or scores_by_user):
        raise UserError(
            f"{run.path}: its head has no users to adapt: it scores alike for everyone, or for all of one group."
        )
    refuse_solver(solver, head, restored.config.loss)
    with opened_pairs(restored, pairs, world, beside=out) as data:
        rows = data.rows(split) if pairs is None else np.arange(len(data.comparisons))
        if num_pairs is not None:
            rows = few_per_user(data, rows, num_pairs, seed)
        if len(rows) == 0:
            raise UserError(
                f"{pairs or f'--split {split}'}: no pairs to adapt to. Give --pairs, comparisons of new users; the "
                "split unseen_train has some where data.unseen_user_fraction holds users out."
            )
        positions = num_positions(restored, data)
        users = NewUsers.of(data, rows, positions)
        warn_of_pairs(users.ids, restored, pairs, data.info["dropped"])
        inputs = _inputs(restored, data, users, solver, seed, world)
        if not options.posterior:
            inputs["posterior"] = False
        folder = ShardFolder(out, inputs)
        fitted_to = restored.fitted_to(head)
        if (made := fitted_before(out, folder, fitted_to)) is not None:
            return made
        folder.begin()
        width = head.num_prototypes + head.residual_size
        table = UserTable(width, users.ids, restored.config.users, seed=seed)
        reason = why_no_posterior(head, restored.config.loss)
        if options.posterior and reason:
            logger.warning(
                "how sure the fit is of each user is not written (`score --std`, `ask`): %s", reason
            )
        sure = options.posterior and reason is None
        left_out = options.posterior and "context" not in head.needs
        fitting = Fitting(restored, data, users, table.logits, solver, world, sure, left_out)
        shards = fitting.all_shards(folder, positions)
    table.logits.copy_(torch.cat([shard.logits for shard in shards]))
    if table.has_reliability:
        table.log_reliability.copy_(torch.cat([shard.log_reliability for shard in shards]))
    table.seen.fill_(True)
    report: AdaptReport = {"inputs": folder.key, **figures_of_fit(restored, table, shards)}
    with new_files(out) as aside:
        table.save(aside)
        if sure:
            write_posterior(aside, torch.cat([shard.covariance for shard in shards]))
        write_record(aside, fitted_to)
        write_user_figures(aside / REPORT, report)
    folder.remove()
    return report


def _inputs(
    restored: OpenRun, data: PreparedData, users: NewUsers, solver: Solver, seed: int, world: World
) -> dict[str, object]:
    """All that the fitted numbers depend on, as JSON."""
    return {
        "fit": FIT_VERSION,
        "data": data.hash,
        "rows": xxhash.xxh3_128_hexdigest(users.rows.tobytes()),
        "config": xxhash.xxh3_128_hexdigest(restored.run.config_file.read_bytes()),
        "checkpoint": restored.manifest,
        "solver": solver,
        "seed": seed,
        "device": world.device.type,
        "shards": users.spans,
    }


@dataclass(frozen=True)
class Fitting:
    """Common inputs of the fits of all shards of one call."""

    restored: OpenRun
    data: PreparedData
    users: NewUsers
    fresh: Float[torch.Tensor, "U K"]
    """Logits that the users would start with in training."""
    solver: Solver
    world: World
    has_posterior: bool
    wants_left_out: bool

    def all_shards(self, folder: ShardFolder, positions: np.ndarray) -> list[FittedShard]:
        """Every shard: read where an earlier start left it, else fitted and written."""
        users = self.users
        kept = (folder.read(n, end - begin) for n, (begin, end) in enumerate(users.spans))
        shards = {number: shard for number, shard in enumerate(kept) if shard is not None}
        missing = [number for number in range(len(users.spans)) if number not in shards]
        if shards:
            logger.info("%d of %d shards are there already", len(shards), len(users.spans))
        common = self._common_reader(missing, positions)
        prior = prior_of(self.restored, self.world)
        with progress_bar("fitting users", len(missing), shown=True, unit="users") as advance:
            for number in missing:
                shards[number] = self._shard(users.spans[number], common, prior)
                folder.write(number, shards[number])
                advance(len(shards[number].logits))
        return [shards[number] for number in range(len(users.spans))]

    @cached_property
    def _population(self) -> Float[torch.Tensor, "1 K"]:
        """The point of a user of whom nothing is known."""
        head = self.restored.model.head
        return widened(user_mixtures(head, self.restored.users)[-1:], head)

    def _common_reader(self, missing: list[int], positions: np.ndarray) -> Reader | None:
        """Make one reader for all shards, each text encoded once, where states have room together or lie on disk."""
        if not missing:
            return None
        rows = np.concatenate([self.users.rows_of(self.users.spans[n]) for n in missing])
        table = self.data.comparisons[rows]
        texts = np.unique(np.concatenate([table["a"], table["b"]]))
        on_disk = (
            self.restored.config.backbone.cache is not None and self.restored.parts.needs_store
        )
        on_disk = on_disk or self.data.response_vectors is not None
        if positions[texts].sum() > new_users.POSITIONS_PER_SHARD and not on_disk:
            return None
        return self._reader(rows)

    def _reader(self, rows: np.ndarray) -> Reader:
        return reader_of(
            restored=self.restored,
            data=self.data,
            rows=rows,
            table_rows=self.users.table_rows,
            world=self.world,
            encode_ahead=True,
        )

    def _shard(self, span: tuple[int, int], common: Reader | None, prior: UserPrior) -> FittedShard:
        """Fits the users of a span and scores the pairs they were fitted from as an evaluation would."""
        begin, end = span
        rows = self.users.rows_of(span)
        reader = common or self._reader(rows)
        collator = replace(reader.collator, table_rows=self.users.table_rows - begin)
        owner = collator.user_rows(rows)
        loss, device = self.restored.config.loss, self.world.device
        pairs = UserPairs(rows, owner, end - begin)
        where = reader.model, collator, pairs
        solver, initial = self.solver, self.fresh[begin:end]
        fitted = fit_users(*where, loss=loss, prior=prior, solver=solver, initial=initial)
        head = self.restored.model.head.eval()
        with torch.no_grad():
            mixtures = head.mixture_weights(UserState(fitted.logits.to(device)))
        num_pairs = pairs_per_chunk(head, collator, rows)
        forwards = Forwards(reader.model, collator, num_pairs, self.world)
        labels = preferences(self.data.comparisons[rows]).astype(float)
        points = mixtures, self._population.to(device).expand_as(mixtures)
        right, right_before = (correctness(forwards.margins(rows, p), labels) for p in points)
        size = end - begin
        sure = UserPosteriors(torch.zeros(size, 0, 0), *torch.zeros(2, size))
        if self.has_posterior:
            assert isinstance(prior, LogitPrior), "directions of users' own have no posterior yet"
            sure = posterior_of_users(*where, fitted, loss=loss, prior=prior)
        left_out = np.zeros(0)
        if self.wants_left_out:
            left_out = right_where_left_out(
                *where, loss=loss, prior=prior, solver=solver, initial=initial
            )
        r = fitted.log_reliability
        return FittedShard(
            fitted.logits,
            torch.from_numpy(np.bincount(owner, minlength=size)),
            torch.from_numpy(np.bincount(owner, weights=right, minlength=size)),
            torch.from_numpy(np.bincount(owner, weights=right_before, minlength=size)),
            *sure,
            torch.from_numpy(left_out),
            torch.zeros(0) if r is None else r,
        )
