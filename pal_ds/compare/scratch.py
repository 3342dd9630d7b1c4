"""The row of regressions from scratch: each seen user's own on the frozen features that the methods read."""

import numpy as np

from pal_ds.compare.evaluations import (
    accuracy_of,
    is_finished,
    scratch_file,
    scratch_of,
    users_above,
)
from pal_ds.compare.suite import Suite
from pal_ds.config.recipe import asks_for_code
from pal_ds.data.tables import PreparedData
from pal_ds.distributed.world import World
from pal_ds.errors import writing
from pal_ds.eval.baselines import FormatBaseline
from pal_ds.eval.figures import figures_of, prompt_counts
from pal_ds.eval.scratch_users import scratch_margins
from pal_ds.inference.load_run import restore
from pal_ds.inference.readers import reader_of
from pal_ds.io.files import write_json


def make_scratch(suite: Suite, fold: str, data: PreparedData, world: World) -> None:
    """Write OUT/scratch/[FOLD/]SPLIT.json: `figures_of` the regressions; on all ranks. Nothing where it is there.

    Nothing either where features are not frozen, or no run of the suite is finished, by whose reader texts are read.
    """
    planned = world.from_rank_zero(lambda: _place_of_reader(suite, fold, data))
    if planned is None:
        return
    chosen = suite.planned[planned]
    own = asks_for_code(chosen.recipe)
    restored = world.on_every_rank(lambda: restore(chosen.run, device=world.device, trust_code=own))
    if data.response_vectors is None and not restored.parts.needs_store:
        return
    train, tested = data.rows("train"), data.rows(suite.settings.split)
    users = np.arange(len(data.users))
    reader = reader_of(restored, data, np.union1d(train, tested), users, world)
    owner = data.comparisons["user"]

    def write() -> None:
        margins = scratch_margins(
            reader.collator,
            fit_rows=train,
            fit_owner=owner[train],
            num_users=len(users),
            test_rows=tested,
            test_owner=owner[tested],
        )
        path = scratch_file(suite, fold)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        # Those whom the run knows, so that all rows of the table are about the same pairs.
        is_known = restored.users.ids.find(data.users)[owner[tested]] >= 0
        write_json(path, _figures(suite, data, tested, margins, is_known))

    world.from_rank_zero(write)


def _place_of_reader(suite: Suite, fold: str, data: PreparedData) -> int | None:
    """Return the place of the first finished run of the fold; None without one, or with nothing to do."""
    if not suite.settings.scratch or scratch_of(suite, fold, data) is not None:
        return None
    places = (place for place, planned in enumerate(suite.planned) if planned.fold == fold)
    return next((place for place in places if is_finished(suite.planned[place])), None)


def _figures(
    suite: Suite, data: PreparedData, rows: np.ndarray, margins: np.ndarray, is_known: np.ndarray
) -> dict:
    """Figures of an evaluation, without those of single users; strangers have no comparisons, and a coin decides."""
    format_baseline = FormatBaseline.of(data)
    known, strangers = (
        figures_of(data, rows[who], margins[who], 1.0, format_baseline)
        for who in (is_known, ~is_known)
    )
    users = [entry for side in (known, strangers) for entry in side["users"].items()]
    above = users_above(suite, data)
    pairs = known["pairs"] + strangers["pairs"]
    right = known["pairs"] * (known["accuracy"] or 0.0) + strangers["pairs"] * 0.5
    return {
        **{key: value for key, value in known.items() if key != "users"},
        "everyone": right / pairs if strangers["pairs"] else known["accuracy"],
        "users_above": {number: accuracy_of(users, ids) for number, ids in above.items()},
        "by_prompt": prompt_counts(data, rows, margins),
        "data": data.hash,
    }
