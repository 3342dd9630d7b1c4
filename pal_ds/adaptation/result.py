"""The result of `adapt`: its report, and what a command finds at OUT that another one made or began."""

import logging
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

logger = logging.getLogger(__name__)

REPORT = "report.json"
"""The last file that is written."""


class AdaptedUser(TypedDict):
    """A user's entry in OUT/report.json."""

    pairs: int
    accuracy_on_these_pairs: float
    """Share of the pairs that the fit explains; optimistic, since it was fitted to them."""
    mixture: list[float]
    """Weight of each prototype; K numbers that sum to 1."""
    margin_std: NotRequired[float]
    """Mean over these pairs of the standard deviation of the margin, in the margin's units: how sure the fit is."""


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
    mixtures = user_mixtures(restored.model.head, table)[:-1].tolist()
    num_pairs = torch.cat([shard.num_pairs for shard in shards])
    num_right = torch.cat([shard.num_right for shard in shards])
    accuracy = (num_right / num_pairs).tolist()
    users: dict[str, AdaptedUser] = {
        user: {"pairs": count, "accuracy_on_these_pairs": share, "mixture": mixture}
        for user, count, share, mixture in zip(
            table.ids, num_pairs.tolist(), accuracy, mixtures, strict=True
        )
    }
    if all(shard.covariance.shape[1] for shard in shards):
        margin_std = torch.cat([shard.margin_std for shard in shards]).tolist()
        for entry, std in zip(users.values(), margin_std, strict=True):
            entry["margin_std"] = std
    total = int(num_pairs.sum())
    return {
        "step": restored.step,
        "pairs": total,
        "accuracy_on_these_pairs": float(num_right.sum()) / total,
        "users": users,
    }
