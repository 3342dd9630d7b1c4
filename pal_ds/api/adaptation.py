"""`adapt` and `few_shot` from Python."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pal_ds.api.run import AnyRun, Records, as_file, for_people, run_of
from pal_ds.runs.run_dir import RunDirectory


@dataclass(frozen=True)
class AdaptedUsers:
    """New users of a run: `evaluate`, `score` and `consolidate` take it, or its path, as `users`."""

    path: Path
    """Folder of users.safetensors, users.arrow and report.json."""
    report: dict[str, Any]
    """Pairs and accuracy of the fit on them (optimistic), over all and per user."""

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def mixtures(self) -> dict[str, list[float]]:
        """Each user's point s_u, K numbers, by user id."""
        return {user: facts["mixture"] for user, facts in self.report["users"].items()}


def few_shot(
    run: AnyRun,
    num_comparisons: Sequence[int] = (0, 1, 2, 4, 8, 16, 32, 50),
    num_draws: int = 20,
) -> dict[str, Any]:
    """Accuracy of held-out users after k comparisons each; also written to RUN/eval/few_shot.json.

    Args:
        run: a run whose data hold users out (`data.unseen_user_fraction`).
        num_comparisons: values of k.
        num_draws: random draws of the k comparisons.

    Returns:
        `curve`, one row per k with `accuracy` and its interval, `seen` users beside, and `monotone_within_ci95`.

    Raises:
        UserError: no held-out users, or no k or draw.
    """
    from pal_ds.adaptation.few_shot import evaluate_few_shot

    where = run_of(run)
    with for_people():
        return dict(
            evaluate_few_shot(
                RunDirectory(where.path),
                list(num_comparisons),
                num_draws,
                step=str(where.step),
                trust_checkpoint=where.trust_checkpoint,
            )
        )


def adapt(
    run: AnyRun,
    pairs: Records | None,
    out: str | os.PathLike[str],
    *,
    split: str = "unseen_train",
    num_pairs: int | None = None,
    seed: int = 0,
    solver: Literal["auto", "newton", "adam", "reference"] = "auto",
) -> AdaptedUsers:
    """Fits new users to a run from a few comparisons each; the model stays as it is.

    Args:
        run: what was trained.
        pairs: their comparisons; None takes `split` of the run's data.
        out: new or empty folder for the user table.
        split: split of the run's data, without `pairs`.
        num_pairs: comparisons to keep per user; None keeps all.
        seed: of the draw of comparisons.
        solver: `newton` from statistics; `adam`, the same objective; `reference`, AdamW that stops early.

    Raises:
        UserError: a head without users, comparisons that cannot be read, or an `out` that holds something.
    """
    from pal_ds.adaptation.run import AdaptOptions, adapt_run

    where, folder = run_of(run), Path(out)
    with for_people(), as_file(pairs) as file:
        options = AdaptOptions(
            pairs=file,
            split=split,
            num_pairs=num_pairs,
            step=str(where.step),
            seed=seed,
            solver=solver,
            trust_checkpoint=where.trust_checkpoint,
        )
        report = adapt_run(RunDirectory(where.path), folder, options)
        return AdaptedUsers(folder, dict(report))
