"""The training loop. It knows no method: parts come from the recipe, figures go to the run directory."""

import datetime
import functools
import logging

import numpy as np

from pal_ds.config.changes import changed_keys
from pal_ds.config.recipe import record_recipe
from pal_ds.data.collator import Collator
from pal_ds.data.loader import UpdateInputs, updates_from
from pal_ds.distributed import phase
from pal_ds.distributed.agreement import installation_facts, own_version
from pal_ds.distributed.preemption import StopRequested, ignore_stop_signals
from pal_ds.distributed.watchdog import is_symptom
from pal_ds.engine.checkpoint.checkpoint import save_checkpoint
from pal_ds.engine.checkpoint.manifest import TrainingFacts
from pal_ds.engine.checkpoint.retention import retain
from pal_ds.engine.step import Stepper, UpdateStats
from pal_ds.errors import NumericError, StorageError
from pal_ds.io.fault_points import reached
from pal_ds.io.files import write_json
from pal_ds.modeling.build import Parts, RunContext
from pal_ds.progress import progress_bar
from pal_ds.runs.run_dir import RunDirectory, RunState, Status
from pal_ds.training.divergence import refuse_lost
from pal_ds.training.evaluation import evaluate_in_training
from pal_ds.training.log_lines import log_end, warn_of_gap
from pal_ds.training.setup import start_training
from pal_ds.training.state import Training, plan_of
from pal_ds.users.row_prior import LEARN_EVERY

logger = logging.getLogger(__name__)


def train(
    context: RunContext,
    parts: Parts,
    *,
    encoded: Collator | None = None,
    trust_checkpoint: bool = False,
    recipe: str | None = None,
) -> Collator | None:
    """Train until the last update (or `train.stop_after`), resuming from the newest intact checkpoint.

    Returns the collator, which a sweep over heads and seeds on one frozen backbone passes on as `encoded`; None where
    a stop was asked for before all texts were encoded.
    `recipe` (YAML) becomes the run's config.yaml once all is loaded, so that a start that fails changes nothing.
    """
    run, world = context.run, context.world
    try:
        state = start_training(context, parts, encoded=encoded, trust_checkpoint=trust_checkpoint)
    except StopRequested as stop_error:
        end_before_updates(context, str(stop_error))
        return None
    try:
        if recipe is not None:
            is_over = state.step == state.num_updates and not state.owes_evaluation
            world.from_rank_zero(lambda: record_start(run, recipe, is_over=is_over))
        run_updates(state)
    except KeyboardInterrupt:
        if world.is_rank_zero:
            run.write_status(status_of(state, "stopped", "interrupted without a save"))
        raise
    except Exception as error:
        # Of what other ranks cause, the watchdog finds and records the cause.
        if world.is_rank_zero and not is_symptom(error):
            try:
                # Rank 0 alone, as the others may be gone.
                run.write_status(status_of(state, "failed", str(error)))
            except (OSError, StorageError) as problem:
                logger.warning("status.json could not be written: %s", problem)
        raise
    finally:
        # Without this a finished process may abort in DeepSpeed's background threads.
        state.engine.destroy()
    return state.collator


def record_start(run: RunDirectory, recipe: str, *, is_over: bool = False) -> None:
    """Write down what is about to be trained and what trains it; of a run that is over, nothing is.

    Raises:
        StorageError: it cannot be written.
    """
    if is_over and run.config_file.is_file():
        if changed := changed_keys(run.config_file.read_text(encoding="utf-8"), recipe):
            logger.warning(
                "%s: all updates are made, so nothing is trained with the other values of %s; config.yaml stays",
                run.path,
                ", ".join(changed),
            )
        return
    record_recipe(run, recipe)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    run.write_installation({"started": now, **own_version(), **installation_facts()})


def end_before_updates(context: RunContext, reason: str) -> None:
    """Record a run that was stopped while it was loading: the next start goes on from checkpoint and cache."""
    config, run = context.config, context.run
    step = context.world.from_rank_zero(lambda: max(run.complete_steps(), default=0))
    num_updates = config.train.epochs * plan_of(config, context.data).updates_per_epoch
    if context.world.is_rank_zero:
        logger.warning(
            "stopping before the first update of this start, at update %d of %d (%s)%s; the same command resumes",
            step,
            num_updates,
            reason,
            ": texts that were encoded are kept" if config.backbone.cache else "",
        )
    facts: Status = {"state": "stopped", "step": step, "num_updates": num_updates, "reason": reason}
    context.world.from_rank_zero(lambda: run.write_status(facts))


def run_updates(state: Training) -> None:
    """Make updates until the last one or until a stop is asked for."""
    last = min(state.config.train.stop_after or state.num_updates, state.num_updates)
    metrics, stepper = state.metrics, state.stepper
    if state.step < state.num_updates or state.owes_evaluation:
        metrics.open(state.step)
    write_status(state, "running")
    if state.step == state.num_updates:
        # An earlier start may have ended between its last save and the deletion of old checkpoints.
        publish_best(state)
    with progress_bar(
        "training", state.num_updates, shown=state.world.is_rank_zero, unit="pairs"
    ) as advance:
        for _ in range(state.step):
            advance(0)
        stop = state.watch.reason_to_stop(state.world, evaluation_due=False)
        stop = stop or evaluate_first(state)
        state.watch.begin_lap()
        metrics.lines.begin(state.step)
        phase.enter("build batches", state.step)
        settings = state.config.train
        ignore = functools.partial(ignore_stop_signals, settings.stop_signals)
        up_to = state.step if stop else last
        for inputs in updates_from(state.inputs, state.step, up_to, settings.num_workers, ignore):
            stats = make_update(state, stepper, inputs)
            state.watch.end_lap()
            metrics.add(stats)
            stop = "stop_after" if state.step == last else agree_on_stop(state)
            stop = log_evaluate_save(state, stop)
            advance(stats.num_pairs, loss=metrics.last_loss)
            if stop:
                break
            state.watch.begin_lap()
    metrics.close()
    if state.step == state.num_updates and not state.owes_evaluation:
        # Also of an end that an older version saved.
        refuse_lost(state)
        write_status(state, "finished")
        if state.world.is_rank_zero:
            log_end(state.run, state.best, state.guard.num_skipped)
            dev = state.data.comparisons["a"][state.data.rows("dev")]
            warn_of_gap(state.run, state.best, len(np.unique(state.data.response_prompt[dev])))
    else:
        write_status(state, "stopped", stop or "stop_after")


def evaluate_first(state: Training) -> str | None:
    """Make the evaluation before all updates, or one that a stop left out; return the reason to stop, or None."""
    try:
        if state.step == 0 and state.config.train.eval_at_start:
            evaluate_in_training(state, at_start=True)
        if state.owes_evaluation and evaluate_in_training(state):
            publish_best(state)
    except StopRequested as stop_error:
        return str(stop_error)
    return None


def make_update(state: Training, stepper: Stepper, inputs: UpdateInputs) -> UpdateStats:
    """Make the next update, or skip it where the guard says so."""
    batches = [batch.to(state.world.device) for batch in inputs.batches]
    try:
        stats = stepper.run(state.step, batches, inputs.runs, inputs.user_rows)
    except NumericError as error:
        rows = ", ".join(map(str, inputs.rows[:8])) + (", ..." if len(inputs.rows) > 8 else "")
        epoch, index = divmod(state.step, state.plan.updates_per_epoch)
        # For a person who wants to look at its comparisons.
        raise NumericError(
            f"{error} (Update {index} of epoch {epoch}: rows {rows} of {state.data.path}/comparisons.npy.)"
        ) from None
    state.step += 1
    learn_prior_of_rows(state)
    phase.enter("build batches", state.step)
    return stats


def learn_prior_of_rows(state: Training) -> None:
    """Learn the prior of users' rows from the table anew, where that is due."""
    prior = state.prior
    if prior is None or not state.learns_prior or state.step % LEARN_EVERY:
        return
    phase.enter("learn the prior of users", state.step)
    records = state.users.records_of(prior.sampled)
    num_comparisons = len(state.plan.comparisons) * state.config.train.batch_pairs / state.step
    beta2 = state.config.users.betas[1]
    learnt = state.world.from_rank_zero(lambda: prior.estimate(records, num_comparisons, beta2))
    if learnt is not None:
        prior.load_state_dict(learnt)


def agree_on_stop(state: Training) -> str | None:
    """Return why all ranks stop after this update, or None; a signal or the clock may have asked for it."""
    phase.enter("agree")
    next_step = state.step + 1
    due = state.due(state.config.train.eval_every, next_step)
    reason = state.watch.reason_to_stop(state.world, evaluation_due=due)
    if reason and state.world.is_rank_zero:
        logger.warning(
            "stopping after update %d of %d (%s): saving; the same command resumes",
            state.step,
            state.num_updates,
            reason,
        )
    return reason


def log_evaluate_save(state: Training, stop: str | None) -> str | None:
    """Do what is due after an update; return the reason to stop, which may come up on the way.

    A stop on request leaves no time for an evaluation: the next start makes it.
    """
    config = state.config.train
    if state.step % config.log_every == 0 or state.step == state.num_updates:
        state.metrics.log(state.step, state.step / state.plan.updates_per_epoch)
    if state.step == state.num_updates or stop == "stop_after":
        refuse_lost(state)
    improved = False
    state.owes_evaluation = state.due(config.eval_every)
    if state.owes_evaluation and stop in (None, "stop_after"):
        try:
            improved = evaluate_in_training(state)
        except StopRequested as stop_error:
            stop = str(stop_error)
    # While updates are being skipped the run may be lost: its checkpoints must not push out the good ones.
    state.owes_save = state.owes_save or state.due(config.save_every)
    if stop or improved or (state.owes_save and state.guard.num_in_a_row == 0):
        save(state)
    phase.enter("build batches")
    return stop


def write_status(state: Training, name: RunState, reason: str | None = None) -> None:
    """Write status.json from every rank: what a batch script asks for before it queues the job again."""
    facts = status_of(state, name, reason)
    state.world.from_rank_zero(lambda: state.run.write_status(facts))


def status_of(state: Training, name: RunState, reason: str | None) -> Status:
    """Return what status.json says of a run."""
    step, num_updates = state.step, state.num_updates
    return {"state": name, "step": step, "num_updates": num_updates, "reason": reason}


def save(state: Training) -> None:
    """Write a checkpoint, then the best pointer, then make the deletion of old ones: never the other way round."""
    facts: TrainingFacts = {
        "dataset_hash": state.data.hash,
        "num_updates": state.num_updates,
        "best": state.best,
        "base_weights": state.base_weights,
        "init_from": state.origin,
        "guard": state.guard.state_dict(),
        "users_prior": state.learnt_prior,
        "owes_evaluation": state.owes_evaluation,
        "save_seconds": state.watch.save_seconds,
        "unlogged": list(state.metrics.unlogged()),
    }
    state.owes_save = False
    phase.enter("save")
    with state.watch.timed("save"):
        save_checkpoint(state.engine, state.users, state.run, state.step, state.world, facts)
        publish_best(state)


def publish_best(state: Training) -> None:
    """Write best.json, then delete what neither it nor `train.keep_checkpoints` wants."""

    def publish() -> None:
        if state.best is None:
            # Of a checkpoint that was damaged or never published: what it names may be gone.
            (state.run.path / "best.json").unlink(missing_ok=True)
        else:
            write_json(state.run.path / "best.json", state.best)
            reached("best.json written")
        retain(
            state.run,
            max(2, state.config.train.keep_checkpoints),
            None if state.best is None else state.best["step"],
            now=state.step,
        )

    state.world.from_rank_zero(publish)
