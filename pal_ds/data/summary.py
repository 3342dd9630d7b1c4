"""Words about prepared data: the table of counts that `prepare` prints, and what is worth a line of its own."""

import logging

from rich.console import Console
from rich.table import Table

from pal_ds.data.splits import SplitOptions
from pal_ds.data.tables import PreparedData
from pal_ds.users.ids import POPULATION_USER

logger = logging.getLogger(__name__)


def print_summary(data: PreparedData) -> None:
    """A table of counts by split, users and dropped rows."""
    info = data.info
    table = Table(title=f"Prepared data: {data.path}")
    table.add_column("what")
    table.add_column("count", justify="right")
    for name, count in info["counts"]["splits"].items():
        if count:
            bayes = info.get("bayes_accuracy", {}).get(name)
            note = f" (best possible accuracy {bayes:.3f})" if bayes else ""
            table.add_row(f"comparisons, {name}{note}", f"{count:,}")
    for name in ("prompts", "responses", "seen_users", "unseen_users"):
        table.add_row(name.replace("_", " "), f"{info['counts'][name]:,}")
    if num_truncated := info.get("truncated_prompts"):
        table.add_row("responses whose prompt will be truncated", f"{num_truncated:,}")
    for kind, count in sorted(info.get("not_shown", {}).items()):
        table.add_row(f"texts whose template leaves out: {kind}", f"{count:,}")
    for reason, count in sorted(info["dropped"].items()):
        table.add_row(f"dropped: {reason}", f"{count:,}")
    Console().print(table)


def warn_of_gaps(data: PreparedData, options: SplitOptions) -> None:
    """Tell, a line each, what of prepared data will be missed later: a split without pairs, users, held-out users."""
    counts = data.info["counts"]
    splits, prompts = counts["splits"], counts["prompts"]
    missed = {
        "train": "there is nothing to train on",
        "dev": "a training makes no evaluation and keeps no best checkpoint",
        "test": "`evaluate` has nothing to measure unless --split or --data says what",
    }
    for name, consequence in missed.items():
        if not splits.get(name) and not (name != "train" and splits.get(f"unseen_{name}")):
            logger.warning(
                "%s: none of %d prompts is in the split %s: %s. %s",
                data.path,
                prompts,
                name,
                consequence,
                _remedy(name, options),
            )
    if [*data.users] == [POPULATION_USER]:
        logger.warning(
            "%s: no record names its user: all comparisons are of one, %s. Records name users by `user_id`, or by the "
            "column that the source is given for it.",
            data.path,
            POPULATION_USER,
        )
    if options.unseen_user_fraction > 0 and not counts["unseen_users"]:
        logger.warning(
            "%s: data.unseen_user_fraction is %g, and no user is held out: the source says itself who is, or there are "
            "too few users.",
            data.path,
            options.unseen_user_fraction,
        )


def _remedy(name: str, options: SplitOptions) -> str:
    """Say how to get pairs into a split."""
    if options.split == "field":
        return "With data.split: field the records say it: their key `split`."
    if name == "train":
        return "Lower data.dev_fraction and data.test_fraction, or give more prompts."
    return f"Raise data.{name}_fraction ({getattr(options, f'{name}_fraction'):g}), or give more prompts."
