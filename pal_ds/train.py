"""The training loop. It knows no method: parts come from the recipe, figures go to the run directory."""

import numpy as np

from pal_ds.config import RunConfig
from pal_ds.data.batch import Batch, Collator
from pal_ds.data.plan import split_update
from pal_ds.data.tables import PreparedData
from pal_ds.engine.checkpoint import retain, save_checkpoint
from pal_ds.engine.dist import World
from pal_ds.engine.step import Stepper, UpdateStats
from pal_ds.evaluate import dev_temperature, figures_of, predict, user_mixtures
from pal_ds.progress import progress_bar
from pal_ds.run_dir import RunDirectory, write_json
from pal_ds.start import Training, start_training
from pal_ds.tracking import Tracker


def train(
    config: RunConfig,
    run: RunDirectory,
    data: PreparedData,
    world: World,
    *,
    encoded: Collator | None = None,
    trust_checkpoint: bool = False,
    recipe: str | None = None,
) -> Collator:
    """Trains until the last update (or `train.stop_after`), resuming from the newest intact checkpoint.

    Returns the collator, which a sweep over heads and seeds on one frozen backbone passes on as `encoded`.
    `recipe` (YAML) becomes the run's config.yaml once all is loaded, so that a start that fails changes nothing.
    """
    state = start_training(
        config, run, data, world, encoded=encoded, trust_checkpoint=trust_checkpoint
    )
    try:
        if recipe is not None:
            world.from_rank_zero(lambda: run.write_config(recipe))
        run_updates(state)
    finally:
        # Without this a finished process may abort in DeepSpeed's background threads.
        state.engine.destroy()
    return state.collator


def run_updates(state: Training) -> None:
    """The loop: update, log, evaluate, save."""
    config, world = state.config.train, state.world
    stepper = Stepper(
        engine=state.engine,
        users=state.users,
        loss=state.config.loss,
        optim=state.config.optim,
        users_learning_rate=state.config.users.learning_rate,
        world=world,
        num_updates=state.num_updates,
        seed=config.seed,
        needs_users=state.parts.needs_users,
    )
    last = min(config.stop_after or state.num_updates, state.num_updates)
    tracker = Tracker(state.run, state.config, world)
    with progress_bar(
        "training", state.num_updates, shown=world.is_rank_zero, unit="pairs"
    ) as advance:
        for _ in range(state.step):
            advance(0)
        while state.step < last:
            stats = run_update(state, stepper)
            state.step += 1
            tracker.add(stats)
            if state.step % config.log_every == 0 or state.step == last:
                tracker.log(state.step, state.step / state.plan.updates_per_epoch)
            improved = state.due(config.eval_every) and evaluate_on_dev(state, tracker)
            if improved or state.due(config.save_every) or state.step == last:
                save(state)
            advance(stats.num_pairs, loss=tracker.last_loss)
    tracker.close()


def run_update(state: Training, stepper: Stepper) -> UpdateStats:
    """Builds this rank's micro-batches of the next update and makes it."""
    config, world = state.config.train, state.world
    epoch, index = divmod(state.step, state.plan.updates_per_epoch)
    rows = state.plan.update(epoch, index)
    runs = split_update(len(rows), world.world_size, config.micro_batch_pairs)
    batches = [collate(state, rows, step_runs[world.rank]) for step_runs in runs]
    return stepper.run(state.step, batches, runs, state.collator.user_rows(rows))


def collate(state: Training, rows: np.ndarray, positions: np.ndarray) -> Batch:
    """The micro-batch of these positions of an update."""
    noise = (state.config.train.seed, state.step, state.parts.head.num_prototypes)
    noise = noise if state.parts.needs_users else None
    return state.collator(rows[positions], positions, noise, int(rows[0])).to(state.world.device)


def evaluate_on_dev(state: Training, tracker: Tracker) -> bool:
    """Logs figures on the dev split (seen users); whether its accuracy is the best of the run so far."""
    rows = state.data.rows("dev")
    if len(rows) == 0:
        return False
    state.engine.eval()
    mixtures = user_mixtures(state.parts.head, state.users).to(state.world.device)
    margins = predict(
        state.engine,
        state.collator,
        rows,
        mixtures,
        state.config.train.micro_batch_pairs,
        state.world,
    )
    temperature = dev_temperature(
        margins, state.data.comparisons["label"][rows].astype(float), state.config.loss.kind
    )
    figures = figures_of(state.data, rows, margins, temperature)
    tracker.log_dev(state.step, figures)
    best = state.best
    improved = state.world.from_rank_zero(
        lambda: best is None or figures["accuracy"] > best["dev_accuracy"]
    )
    if improved:
        state.best = {
            "step": state.step,
            "dev_accuracy": figures["accuracy"],
            "temperature": temperature,
        }
    return improved


def save(state: Training) -> None:
    """One checkpoint, then the best pointer, then the deletion of old ones: never the other way round."""
    facts = {
        "dataset_hash": state.data.hash,
        "num_updates": state.num_updates,
        "best": state.best,
        "base_weights": state.base_weights,
    }
    save_checkpoint(state.engine, state.users, state.run, state.step, state.world, facts)

    def publish() -> None:
        if state.best is not None:
            write_json(state.run.path / "best.json", state.best)
        retain(
            state.run,
            max(2, state.config.train.keep_checkpoints),
            None if state.best is None else state.best["step"],
        )

    state.world.from_rank_zero(publish)
