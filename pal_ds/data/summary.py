"""Words about prepared data: the table of counts that `prepare` prints, and what is worth a line of its own."""

import logging
import unicodedata

from rich.console import Console
from rich.table import Table

from pal_ds.data.splits import SplitOptions
from pal_ds.data.tables import PreparedData
from pal_ds.users.ids import POPULATION_USER, UserIds

_NAMED = 3
"""Of alike ids, how many are shown."""
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
            note = f" (best possible accuracy {bayes:.3f})" if bayes is not None else ""
            table.add_row(f"comparisons, {name}{note}", f"{count:,}")
    for name in ("ties", "soft_labels"):
        if count := info["counts"].get(name):
            table.add_row(f"of these, {name.replace('_', ' ')}", f"{count:,}")
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
    elif POPULATION_USER in [*data.users]:
        nobody = [*data.users].index(POPULATION_USER)
        logger.warning(
            "%s: %d of %d comparisons name no user (or are of a user `%s`): all of them are of one, `%s`, who stands "
            "for everybody who is unknown. Give these records their `user_id`, or leave them out.",
            data.path,
            int((data.comparisons["user"] == nobody).sum()),
            len(data.comparisons),
            POPULATION_USER,
            POPULATION_USER,
        )
    for kind, ids in (("users", UserIds.of(data.users)), ("groups", UserIds.of(data.groups))):
        _warn_of_alike(data, kind, ids)
    if options.unseen_user_fraction > 0 and not counts["unseen_users"]:
        logger.warning(
            "%s: data.unseen_user_fraction is %g, and no user is held out: the source says itself who is, or there are "
            "too few users.",
            data.path,
            options.unseen_user_fraction,
        )


def _warn_of_alike(data: PreparedData, kind: str, ids: UserIds) -> None:
    """Tell of ids that a reader takes for one: they differ in blank space around or in Unicode form alone."""
    alike = alike_ids(ids)
    if alike:
        first = "; ".join(" and ".join(map(repr, some)) for some in alike[:_NAMED])
        logger.warning(
            "%s: %d %s have ids that differ in blank space around them or in their Unicode normal form alone, and "
            "count as different ones: %s%s. If they are not, mend the ids and prepare again.",
            data.path,
            sum(map(len, alike)),
            kind,
            first,
            "; ..." if len(alike) > _NAMED else "",
        )


def alike_ids(ids: UserIds) -> list[list[str]]:
    """Return the ids that are one id without blank space around them and in Unicode's form NFC, together.

    >>> alike_ids(UserIds.of(["mia", "tom", " mia", "Mia"]))
    [['mia', ' mia']]
    """
    plain: dict[str, list[str]] = {}
    for written in ids:
        # Most ids are plain already, and of those no two can be alike.
        if not written.isascii() or written[0].isspace() or written[-1].isspace():
            known_as = unicodedata.normalize("NFC", written).strip()
            if known_as != written:
                plain.setdefault(known_as, []).append(written)
    is_used = ids.find([*filter(None, plain)]) >= 0
    used = dict(zip(filter(None, plain), is_used.tolist(), strict=True))
    together = [([name] if used.get(name) else []) + some for name, some in plain.items()]
    return [some for some in together if len(some) > 1]


def _remedy(name: str, options: SplitOptions) -> str:
    """Say how to get pairs into a split."""
    if options.split in ("field", "record"):
        return f"With data.split: {options.split} the records say it: their key `split`."
    if name == "train":
        return "Lower data.dev_fraction and data.test_fraction, or give more prompts."
    return f"Raise data.{name}_fraction ({getattr(options, f'{name}_fraction'):g}), or give more prompts."
