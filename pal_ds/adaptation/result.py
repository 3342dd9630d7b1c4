"""The result of `adapt`: its report, and what a command finds at OUT that another one made or began."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import torch

from pal_ds.adaptation.new_users import FOLDER, FittedShard, ShardFolder
from pal_ds.errors import UserError
from pal_ds.eval.results import read_user_figures
from pal_ds.inference.fitted_to import FittedTo, read_record, write_record
from pal_ds.inference.load_run import OpenRun
from pal_ds.inference.mixtures import user_mixtures
from pal_ds.runs.lock import LOCK
from pal_ds.users import UserTable
from pal_ds.users.ids import named

logger = logging.getLogger(__name__)

REPORT = "report.json"
"""The last file that is written."""


AT_BORDER = 0.99
"""Weight of one prototype from which on a user lies at the border of the simplex."""
UNMOVED = 0.9
"""Share of the margins' standard deviation that is left, from which on comparisons said next to nothing of a user."""
_BEYOND_MIXTURES = (
    ", or they are unlike all of the run's users, whom mixtures do not reach (head.mixture signed or free "
    "does)"
)
_WORSE = (
    "%d of %d users are served worse by their fit than by the population's point, on their own pairs, or on those "
    "left out of the fit in turn (%s; `accuracy_before`, `accuracy_left_out` in the report): their pairs contradict "
    "each other or are too few"
)
_AT_BORDER = (
    "%d of %d users are one prototype and nothing else (%s): more of that is out of a mixture's reach. Weights of any "
    "sign (head.mixture signed or free) are not held there"
)
_UNMOVED = (
    "%d of %d users are known hardly better than before (%s; `margin_std` and `margin_std_before` in the report): "
    "their comparisons say next to nothing of them. `pal-ds ask` chooses some that do"
)


class AdaptedUser(TypedDict):
    """A user's entry in OUT/report.json."""

    pairs: int
    accuracy_on_these_pairs: float
    """Share of the pairs that the fit explains; optimistic, since it was fitted to them."""
    accuracy_before: NotRequired[float]
    """The same share for the population's point, which the user got before; missing from fits of an earlier version."""
    accuracy_left_out: NotRequired[float]
    """The same share for fits to the user's other pairs, see `left_out.py`; missing where none were made."""
    mixture: list[float]
    """The user's point: K weights that sum to 1, or what else the head's users are."""
    reliability: NotRequired[float]
    """The factor of the user's margins, where the run's users have one."""
    margin_std: NotRequired[float | None]
    """Mean over these pairs of the standard deviation of the margin, in the margin's units: how sure the fit is."""
    margin_std_before: NotRequired[float | None]
    """The same before any comparison."""


class AdaptFigures(TypedDict):
    """Figures of a fit."""

    step: int
    pairs: int
    accuracy_on_these_pairs: float
    users: dict[str, AdaptedUser]
    """By user id; see `results.write_user_figures` for many users."""


class AdaptReport(AdaptFigures):
    """OUT/report.json."""

    inputs: str
    """Hash of all that the fit depends on: by it the same command finds its result."""


def refuse_foreign(out: Path) -> None:
    """Raise UserError where `out` holds something else than a fit, whole or begun."""
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if (out.exists() and not out.is_dir()) or (names - {LOCK} and not names & {FOLDER, REPORT}):
        raise UserError(f"--out {out}: not empty. Name an empty or new directory.")


def read_report(out: Path) -> AdaptReport:
    """Return OUT/report.json; that of a job array has no `inputs`. Raises UserError where it is damaged."""
    remedy = f"Delete {out} and fit again, or name another --out."
    return cast(AdaptReport, read_user_figures(out / REPORT, AdaptFigures, remedy))


def fitted_before(out: Path, folder: ShardFolder, fitted_to: FittedTo) -> AdaptReport | None:
    """Return the report of the same fit, or None where there is none. Raises UserError where `out` has another one."""
    if not (out / REPORT).is_file():
        return None
    report = read_report(out)
    if report.get("inputs") != folder.key:
        raise UserError(
            f"--out {out}: not empty: it holds users who were fitted from other pairs, or with other options or code. "
            "Name an empty or new directory."
        )
    logger.info("%s: holds the users of these pairs and options; reusing them", out)
    if read_record(out) is None:
        # An older version wrote it, and these inputs name the checkpoint.
        write_record(out, fitted_to)
    folder.remove()  # where the fit was killed after its report
    return report


def figures_of_fit(restored: OpenRun, table: UserTable, shards: list[FittedShard]) -> AdaptFigures:
    """Report who was fitted from how many pairs, and how well the fit explains them (optimistic, named as such)."""
    head = restored.model.head
    mixtures = user_mixtures(head, table)[:-1].tolist()
    num_pairs = torch.cat([shard.num_pairs for shard in shards])
    num_right = torch.cat([shard.num_right for shard in shards])
    accuracy = (num_right / num_pairs).tolist()
    before = torch.cat([shard.num_right_before for shard in shards]) / num_pairs
    users: dict[str, AdaptedUser] = {
        user: {
            "pairs": count,
            "accuracy_on_these_pairs": share,
            "accuracy_before": share_before,
            "mixture": mixture,
        }
        for user, count, share, share_before, mixture in zip(
            table.ids, num_pairs.tolist(), accuracy, before.tolist(), mixtures, strict=True
        )
    }
    if table.has_reliability:
        for entry, factor in zip(users.values(), table.log_reliability.exp().tolist(), strict=True):
            entry["reliability"] = factor
    if all(shard.covariance.shape[1] for shard in shards):
        _add_posterior(users, shards)
    left_out = torch.cat([shard.num_right_left_out for shard in shards]).tolist()
    for entry, right in zip(users.values(), left_out, strict=False):
        entry["accuracy_left_out"] = right / entry["pairs"]
    warn_of_fits(users, on_simplex=head.on_simplex and "logits" in head.needs)
    total = int(num_pairs.sum())
    return {
        "step": restored.step,
        "pairs": total,
        "accuracy_on_these_pairs": float(num_right.sum()) / total,
        "users": users,
    }


def _add_posterior(users: dict[str, AdaptedUser], shards: list[FittedShard]) -> None:
    """Say of each user how sure the fit is, and how sure one was before it."""
    columns = (
        torch.cat([getattr(shard, name) for shard in shards]).tolist()
        for name in ("margin_std", "margin_std_before")
    )
    for entry, std, before in zip(users.values(), *columns, strict=True):
        entry["margin_std"] = std if math.isfinite(std) else None
        entry["margin_std_before"] = before if math.isfinite(before) else None


def warn_of_fits(users: Mapping[str, AdaptedUser], *, on_simplex: bool) -> None:
    """Warn of users whom the fit serves worse than what they got before, at the border, or of whom it knows no more.

    `on_simplex`: their points are mixtures, which have a border.
    """
    worse, at_border, unmoved = [], [], []
    for name, entry in users.items():
        shown = entry.get("accuracy_left_out", entry["accuracy_on_these_pairs"])
        if min(shown, entry["accuracy_on_these_pairs"]) < entry.get("accuracy_before", 0.0):
            worse.append(name)
        if on_simplex and len(entry["mixture"]) > 1 and max(entry["mixture"]) > AT_BORDER:
            at_border.append(name)
        before, after = entry.get("margin_std_before"), entry.get("margin_std")
        if before and after and after > UNMOVED * before:
            unmoved.append(name)
    worse_text = _WORSE + (_BEYOND_MIXTURES if on_simplex else "")
    for names, text in ((worse, worse_text), (at_border, _AT_BORDER), (unmoved, _UNMOVED)):
        if names:
            logger.warning(text, len(names), len(users), named(names))
