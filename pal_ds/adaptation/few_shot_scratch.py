"""The second curve of `few_shot`: each new user's own regression from scratch, on the same draws and test pairs."""

from collections.abc import Sequence

import numpy as np

from pal_ds.adaptation.active import NewUsersPool
from pal_ds.data.tables import PreparedData
from pal_ds.eval.baselines import length_margins
from pal_ds.eval.metrics import clustered_standard_error, correctness
from pal_ds.eval.schema import CurvePoint, FewShotFigures, ScratchPoint
from pal_ds.eval.scratch_users import NAME, scratch_margins
from pal_ds.heads.jaxtyping_fallback import Float


def scratch_right(
    pool: NewUsersPool, test_rows: np.ndarray, drawn: list[np.ndarray]
) -> Float[np.ndarray, "draws n"]:
    """`metrics.correctness` of the test pairs after each draw, by regressions on the draw's comparisons alone.

    The pool's reader has stored states, or data of vectors.
    """
    collator, num_users, num_draws = pool.reader.collator, pool.num_users, len(drawn)
    test_owner = collator.user_rows(test_rows)
    owners = [draw * num_users + collator.user_rows(part) for draw, part in enumerate(drawn)]
    draws = np.repeat(np.arange(num_draws), len(test_rows))
    margins = scratch_margins(
        collator,
        fit_rows=np.concatenate(drawn),
        fit_owner=np.concatenate(owners),
        num_users=num_draws * num_users,
        test_rows=np.tile(test_rows, num_draws),
        test_owner=draws * num_users + np.tile(test_owner, num_draws),
    )
    labels = collator.data.comparisons["label"][test_rows].astype(float)
    return correctness(margins.reshape(num_draws, -1), labels)


def beside(
    points: Sequence[CurvePoint],
    gains: Float[np.ndarray, "k n"],
    users: np.ndarray,
    prompts: np.ndarray,
) -> list[ScratchPoint]:
    """Points of the regressions' curve, each with the gain of the run over it and the gain's 95% interval.

    Args:
        points: of the regressions.
        gains: correctness of the run less that of the regressions for each test pair, means over draws.
        users: user of each test pair; int64 [n].
        prompts: prompt of each; int64 [n]. The interval is clustered by user or by prompt, whichever is wider.
    """
    beside_points: list[ScratchPoint] = []
    for point, of_point in zip(points, gains, strict=True):
        errors = (clustered_standard_error(of_point, clusters) for clusters in (users, prompts))
        gain, half = float(of_point.mean()), 1.96 * max(errors)
        beside_points.append({**point, "gain": gain, "gain_ci95": [gain - half, gain + half]})
    return beside_points


def length_baseline(data: PreparedData, test_rows: np.ndarray) -> float | None:
    """Share of the test pairs in which the longer text was preferred; None for vectors."""
    table = data.comparisons[test_rows]
    margins = length_margins(data, table)
    if margins is None:
        return None
    return float(correctness(margins, table["label"].astype(float)).mean())


def scratch_lines(figures: FewShotFigures) -> list[str]:
    """Lines for people: the regressions beside the run, and the length baseline."""
    lines = []
    for point in figures.get("scratch", ()):
        low, high = point["gain_ci95"]
        lines.append(
            f"{point['num_comparisons']:4d} comparisons, {NAME}: accuracy {point['accuracy']:.4f}; this run gains "
            f"{point['gain']:+.4f} [{low:+.4f}, {high:+.4f}]"
        )
    if (length := figures.get("length_baseline_accuracy")) is not None:
        lines.append(f"the longer text wins: accuracy {length:.4f}")
    return lines
