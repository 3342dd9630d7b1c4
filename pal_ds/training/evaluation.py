"""Evaluation while a run trains: its dev split, which decides what is best, and other sets, which show what is kept."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from pal_ds.data.collator import Collator
from pal_ds.data.tables import PreparedData, group_codes, preferences
from pal_ds.data.vocabulary import refuse_other_tokenizer
from pal_ds.distributed import phase
from pal_ds.errors import UserError
from pal_ds.eval.figures import dev_temperature, figures_of
from pal_ds.eval.schema import PairFigures
from pal_ds.inference.mixtures import MixtureSource, with_mixtures
from pal_ds.inference.scoring import Forwards
from pal_ds.training.state import EvalSet, Training
from pal_ds.users.ids import UserIds


def open_eval_sets(
    paths: dict[str, str], data: PreparedData, collator: Collator, ids: UserIds
) -> list[EvalSet]:
    """Open the dev splits of prepared data, read as the run reads its own `data`; users of the run are found by id.

    Raises:
        UserError: a folder holds no prepared data, none of the run's kind and tokenizer, or no dev split.
    """
    sets = []
    for name, path in sorted(paths.items()):
        other = PreparedData.open(Path(path))
        key = f"train.eval_sets.{name}: {path}"
        for fact in ("kind", "vector_size"):
            if other.info[fact] != data.info[fact]:
                raise UserError(
                    f"{key}: {fact} is {other.info[fact]}, that of {data.path} {data.info[fact]}."
                )
        if other.info["kind"] == "tokens":
            tokens = other.info["tokens"]
            refuse_other_tokenizer(key, other.tokenizer_path, tokens, data, rewritten=False)
        rows = other.rows("dev")
        if len(rows) == 0:
            raise UserError(f"{key}: its dev split is empty. Prepare it with a data.dev_fraction.")
        table_rows = ids.find(other.users)
        read = replace(
            collator,
            data=other,
            table_rows=table_rows,
            group_codes=group_codes(data, other),
            response_store=None,
            prompt_store=None,
        )
        sets.append(EvalSet(name, read, rows))
    return sets


def evaluate_in_training(state: Training, *, at_start: bool = False) -> bool:
    """Log figures on dev (seen users) and `train.eval_sets`; return True where dev accuracy is the run's best so far.

    `at_start`: before any update, of which there is no checkpoint: nothing can be best.

    Raises:
        StopRequested: a stop was asked for before all was scored.
    """
    rows, sets = state.data.rows("dev"), state.eval_sets
    if len(rows) == 0 and not sets:
        state.owes_evaluation = False
        return False
    phase.enter("evaluate")
    state.engine.eval()
    figures: dict[str, PairFigures] = {}
    margins, temperature = np.empty(0), 1.0
    with state.watch.timed("evaluation"):
        if len(rows):
            margins = _margins(state, state.collator, rows)
            labels = preferences(state.data.comparisons[rows]).astype(float)
            temperature = dev_temperature(margins, labels, state.config.loss.kind)
            figures["dev"] = figures_of(state.data, rows, margins, temperature)
        for other in sets:
            other_margins = _margins(state, other.collator, other.rows)
            figures[other.name] = figures_of(
                other.collator.data, other.rows, other_margins, temperature
            )
    state.owes_evaluation = False
    state.metrics.log_evaluation(state.step, figures)
    if at_start or len(rows) == 0:
        return False
    accuracy, best = figures["dev"]["accuracy"], state.best
    if accuracy is None:
        return False  # dev has ties alone
    # A model that has diverged is the best of nothing.
    is_better = np.isfinite(margins).all() and (best is None or accuracy > best["dev_accuracy"])
    improved = state.world.from_rank_zero(lambda: bool(is_better))
    if improved:
        state.best = {"step": state.step, "dev_accuracy": accuracy, "temperature": temperature}
    return improved


def _margins(state: Training, collator: Collator, rows: np.ndarray) -> np.ndarray:
    source = MixtureSource(
        forward=state.engine,
        head=state.parts.head,
        users=state.users,
        world=state.world,
        own=state.collator,
        micro_batch_pairs=state.config.train.micro_batch_pairs,
    )
    scored = with_mixtures(source, collator, rows)
    train = state.config.train
    forwards = Forwards(
        forward=state.engine,
        collator=scored.collator,
        micro_batch_pairs=train.micro_batch_pairs,
        world=state.world,
        micro_batch_tokens=train.micro_batch_tokens,
        between_steps=lambda: state.watch.leave_if_requested(state.world),
    )
    return forwards.margins(rows, scored.mixtures, scored.log_reliability)
