"""`adapt`: few-shot logits for the users of a file or a split, written as a user table with a report."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pal_ds.adapt import LogitPrior, fit_users
from pal_ds.data.plan import keyed_generator
from pal_ds.data.tables import PreparedData
from pal_ds.engine.dist import World
from pal_ds.errors import UserError
from pal_ds.evaluate import predict, user_mixtures
from pal_ds.evaluate_run import Reader, opened_pairs, reader_of
from pal_ds.metrics import correctness
from pal_ds.restore import Restored, restore
from pal_ds.run_dir import RunDirectory, write_json
from pal_ds.users import UserTable

logger = logging.getLogger(__name__)


def adapt_run(
    run: RunDirectory,
    out: Path,
    *,
    pairs: Path | None = None,
    split: str = "unseen_train",
    num_pairs: int | None = None,
    step: str = "latest",
    seed: int = 0,
    trust_checkpoint: bool = False,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Fits every user of `pairs` (a JSONL file) or of a split of the run's data; returns the report.

    `num_pairs` keeps that many comparisons per user, drawn by (seed, user).

    Raises:
        UserError: a head without users, no such file or split, or no pairs in it.
    """
    if num_pairs is not None and num_pairs < 1:
        raise UserError(f"--num_pairs is {num_pairs}; it must be at least 1, or unset for all.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: not empty. Name an empty or new directory.")
    world = World(0, 1, device or torch.device("cpu"))
    restored = restore(run, step, world.device, trust=trust_checkpoint)
    if not restored.parts.needs_users:
        raise UserError(
            f"{run.path}: its head has no users to adapt; every user gets the same scores."
        )
    with opened_pairs(restored, pairs, world) as data:
        rows = data.rows(split) if pairs is None else np.arange(len(data.comparisons))
        if num_pairs is not None:
            rows = few_per_user(data, rows, num_pairs, seed)
        if len(rows) == 0:
            raise UserError(f"{pairs or f'--split {split}'}: no pairs to adapt to.")
        owners, user_index = np.unique(data.comparisons["user"][rows], return_inverse=True)
        _warn_of_known(restored, [data.users[owner] for owner in owners])
        table_rows = np.full(len(data.users), -1, np.int64)
        table_rows[owners] = np.arange(len(owners))
        reader = reader_of(restored, data, rows, table_rows, world)
        prior = LogitPrior.of(restored.users)
        fitted = fit_users(
            reader.model, restored.config.loss, reader.collator, rows, user_index, len(owners), prior,
            world.device, shown=True,
        )  # fmt: skip
        table = UserTable(
            restored.users.num_prototypes,
            [data.users[owner] for owner in owners],
            restored.config.users,
        )
        table.logits.copy_(fitted)
        table.seen.fill_(True)
        report = _report(restored, reader, rows, user_index, table, world)
    table.save(out)
    write_json(out / "report.json", report)
    return report


def _warn_of_known(restored: Restored, ids: list[str]) -> None:
    known = sorted(user for user in ids if user in restored.users)
    if known:
        logger.warning(
            "%d of %d users are in the run already (%s%s): fitted from these pairs alone, and with --users this "
            "fit stands for them in place of the trained one",
            *(len(known), len(ids), ", ".join(known[:3]), ", ..." if len(known) > 3 else ""),
        )


def few_per_user(data: PreparedData, rows: np.ndarray, num_pairs: int, seed: int) -> np.ndarray:
    """At most `num_pairs` of the comparisons `rows` per user, drawn by (seed, user id): other users do not matter."""
    if len(rows) == 0:
        return rows
    users = data.comparisons["user"][rows]
    by_user = np.argsort(users, kind="stable")
    owners, first = np.unique(users[by_user], return_index=True)
    kept = [
        keyed_generator("few", seed, data.users[owner]).permutation(own)[:num_pairs]
        for owner, own in zip(owners, np.split(rows[by_user], first[1:]), strict=True)
    ]
    return np.sort(np.concatenate(kept))


def _report(
    restored: Restored,
    reader: Reader,
    rows: np.ndarray,
    user_index: np.ndarray,
    table: UserTable,
    world: World,
) -> dict[str, Any]:
    """Who was fitted from how much, and how well the fit explains it (an optimistic figure, named as such)."""
    mixtures = user_mixtures(restored.model.head, table).to(world.device)
    micro = restored.config.train.micro_batch_pairs
    margins = predict(reader.model, reader.collator, rows, mixtures, micro, world)
    right = correctness(margins, reader.collator.data.comparisons["label"][rows].astype(float))
    counts = np.bincount(user_index)
    accuracy = np.bincount(user_index, weights=right) / counts
    users = {
        user: {
            "pairs": int(counts[row]),
            "accuracy_on_these_pairs": float(accuracy[row]),
            "mixture": mixture,
        }
        for row, (user, mixture) in enumerate(zip(table.ids, mixtures[:-1].tolist(), strict=True))
    }
    figures = {
        "step": restored.step,
        "pairs": len(rows),
        "accuracy_on_these_pairs": float(right.mean()),
    }
    return {**figures, "users": users}
