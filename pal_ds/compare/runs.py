"""Makes a suite's runs one after the other, each of all ranks, and goes on where it was cut off.

A finished run is not trained again, an evaluation of its last checkpoint is not made again. Everything that can be
refused is refused before the first update: recipes, data, run directories.
"""

import gc
import logging
import os
from pathlib import Path

from pal_ds.adaptation.few_shot import evaluate_few_shot
from pal_ds.compare.evaluations import evaluation_of, few_shot_of, is_evaluated, is_finished
from pal_ds.compare.page import write_table
from pal_ds.compare.scratch import make_scratch
from pal_ds.compare.suite import PlannedRun, Suite
from pal_ds.compare.table import tabulate
from pal_ds.config.changes import changed_keys
from pal_ds.config.recipe import asks_for_code
from pal_ds.data.collator import Collator
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.preemption import stop_is_requested
from pal_ds.distributed.watchdog import watch
from pal_ds.distributed.world import World
from pal_ds.engine.ds_config import ds_config_of
from pal_ds.errors import UserError, writing
from pal_ds.eval.evaluate import evaluate_run
from pal_ds.eval.results import split_request
from pal_ds.inference.load_run import open_run
from pal_ds.modeling.build import assemble
from pal_ds.progress import progress_bar
from pal_ds.training.init_from.copy import origin_for
from pal_ds.training.launch import (
    TrainingRequest,
    joined_with_data,
    train_among,
    world_size_of_launch,
)

logger = logging.getLogger(__name__)


def compare(whole: Suite, chosen: Suite, out: Path) -> str | None:
    """Trains and evaluates the runs of `chosen`, then writes OUT/table.* about `whole`; returns why it stopped early.

    Raises:
        UserError: data that are not there or do not fit a method, or a run directory with other values.
    """
    config, needs = chosen.planned[0].config, whole.settings.needs
    if needs and os.environ.get("RANK", "0") == "0":
        logger.warning("suite %s needs %s", whole.name, needs)
    world_size = world_size_of_launch()
    requests = {
        planned.run.path: TrainingRequest(
            config=planned.config,
            recipe=planned.recipe,
            run=planned.run,
            ds_config=ds_config_of(planned.config.train, world_size),
            trust_code=chosen.trust_code,
        )
        for planned in chosen.planned
    }
    more = f" (Suite {whole.name} needs {needs})" if needs else ""
    configs = {planned.fold: planned.config for planned in reversed(chosen.planned)}
    others = [of_fold for of_fold in configs.values() if of_fold is not config]
    with joined_with_data(config, more, others) as (world, tables):
        data = {chosen.planned[0].fold: world.on_every_rank(tables)}
        for fold in chosen.folds:
            if fold not in data:
                path = configs[fold].data.path
                data[fold] = world.on_every_rank(lambda path=path: PreparedData.open(path))
        reading = world.from_rank_zero(lambda: check_everything(chosen, data))
        reason = make_runs(chosen, reading, data, world, requests)
        if reason is None:
            for fold, of_fold in data.items():
                make_scratch(chosen, fold, of_fold, world)
            world.from_rank_zero(lambda: publish(whole, data, out))
    return reason


Reading = dict[tuple[str, str], str]
"""By fold and method: what decides the states that a training reads."""


def check_everything(suite: Suite, data: dict[str, PreparedData]) -> Reading:
    """Check that every run can start; write nothing. Methods with equal values read equal states of a frozen backbone.

    Raises:
        UserError: the data have no pairs to train on or to score, or nobody held out; a method does not fit them; a
            run directory holds a run with other values.
    """
    settings = suite.settings
    new_users = ("unseen_train", "unseen_test") if settings.few_shot else ()
    for of_fold in data.values():
        for split in ("train", settings.split, *new_users):
            if len(of_fold.rows(split)) == 0:
                raise UserError(
                    f"{of_fold.path}: its split {split} is empty, and suite {suite.name} needs it; there are "
                    f"{of_fold.info['counts']['splits']}. Change the fractions of `data`, `split` or `few_shot`."
                )
    reading: Reading = {}
    for planned in suite.planned:
        key = planned.fold, planned.method
        if key not in reading:
            reading[key] = _reading(planned, data[planned.fold], trust_code=suite.trust_code)
        file = planned.run.config_file
        changed = changed_keys(file.read_text(), planned.recipe) if file.is_file() else []
        if changed:
            raise UserError(
                f"{file}: this run was made with other values of {', '.join(changed)}. Restore them, name another "
                "--out, or delete that run's folder."
            )
    return reading


def _reading(planned: PlannedRun, data: PreparedData, *, trust_code: bool) -> str:
    """Return what decides the states that training reads. Raises UserError where the method does not fit the data."""
    init_from, model_config = planned.config.train.init_from, None
    try:
        if init_from is not None and not planned.run.origin_file.is_file():
            model_config = origin_for(init_from, data, trust_code=trust_code).model_config
        parts = assemble(planned.config, data, planned.run, model_config=model_config)
    except UserError as error:
        raise UserError(f"methods.{planned.method}: {error}") from None
    collator = parts.collator
    texts = (collator.encoding, collator.scored_positions, collator.with_prompt)
    states = (parts.pooling, parts.prompt_tokens)
    return repr((parts.backbone, planned.config.train.precision, texts, states))


def make_runs(
    suite: Suite,
    reading: Reading,
    data: dict[str, PreparedData],
    world: World,
    requests: dict[Path, TrainingRequest],
) -> str | None:
    """Trains and evaluates what is not yet; the reason, where a training stopped on request."""
    encoded: dict[str, Collator] = {}
    fold = None
    places = world.from_rank_zero(
        lambda: [i for i, one in enumerate(suite.planned) if not is_evaluated(one, suite)]
    )
    if world.is_rank_zero and len(places) < len(suite.planned):
        made = len(suite.planned) - len(places)
        logger.info("%d of %d runs are finished and evaluated", made, len(suite.planned))
    if not places:
        return None
    with progress_bar(
        f"comparing {suite.name}", len(places), shown=world.is_rank_zero, unit="runs", outer=True
    ) as advance:
        for planned in [suite.planned[place] for place in places]:
            logger.info("%s, seed %d: %s", planned.method, planned.seed, planned.run.path)
            if planned.fold != fold:
                # Stores are of one fold's tables; the cache on disk serves all of them.
                encoded.clear()
                fold = planned.fold
            # A training sees to it itself; here it may have come while a run was evaluated.
            if world.any_rank(stop_is_requested())[0]:
                return f"stopped before {planned.method}, seed {planned.seed} (signal)"
            stopped = None
            if not world.from_rank_zero(lambda planned=planned: is_finished(planned)):
                request = requests[planned.run.path]
                own, states = data[planned.fold], reading[planned.fold, planned.method]
                stopped = train_one(planned, request, states, own, world, encoded)
            if stopped is not None:
                return stopped
            evaluate_one(planned, suite, world)
            advance(last=f"{planned.method} seed {planned.seed}")
    return None


def train_one(
    planned: PlannedRun,
    request: TrainingRequest,
    reading: str,
    data: PreparedData,
    world: World,
    encoded: dict[str, Collator],
) -> str | None:
    """Trains to the last update; else says where it stopped on request, and why.

    `encoded` keeps the states of a frozen backbone, by `reading`, for the runs that come after.
    """
    config, run = planned.config, planned.run
    collator = train_among(world, request, lambda: data, encoded=encoded.get(reading))
    # Weights that come from no path, as those of `backbone.architecture`, are those of one run alone.
    shared = config.backbone.path is not None
    if collator is not None and collator.response_store is not None and shared:
        encoded[reading] = collator
    # An engine is full of cycles, and the next one needs the room of its weights.
    gc.collect()
    status = world.from_rank_zero(run.status) or {}
    if status.get("state") == "finished":
        return None
    where = f"update {status.get('step')} ({status.get('reason')})"
    return f"{planned.method}, seed {planned.seed}, stopped at {where}"


def evaluate_one(planned: PlannedRun, suite: Suite, world: World) -> None:
    """eval/SPLIT.json and, where the suite asks for it, eval/few_shot.json, as `evaluate` and `few_shot` write them."""
    settings = suite.settings
    # What the run names was allowed when its recipe was read.
    own = asks_for_code(planned.recipe)
    # Alone it waits for nobody; who started it sees whether it goes on.
    minutes = planned.config.train.hang_minutes if world.world_size > 1 else 0
    if world.from_rank_zero(lambda: evaluation_of(planned, settings.split)) is None:
        with watch(world, planned.run.path / "stacks", minutes):
            request = split_request(settings.split)._replace(by_prompt=True)
            evaluate_run(planned.run, world, request=request, trust_code=own)
    if settings.few_shot and world.from_rank_zero(lambda: few_shot_of(planned, suite)) is None:
        opened = world.on_every_rank(lambda: open_run(planned.run, trust_code=own))
        evaluate_few_shot(opened, settings.few_shot, settings.num_draws, world=world)


def publish(suite: Suite, data: dict[str, PreparedData], out: Path) -> None:
    """OUT/table.md, table.json, table.png and few_shot.png, of all that is finished by now."""
    from pal_ds.compare.pictures import draw

    table = tabulate(suite, data)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        draw(table, out)
        write_table(table, out)
