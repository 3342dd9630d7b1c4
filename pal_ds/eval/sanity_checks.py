"""Warnings about results too good, or too cheap, to be true: what a leak or an artefact of the data looks like."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pal_ds.data.dataset_info import DatasetInfo
from pal_ds.eval.metrics import clustered_standard_error

SUSPICIOUS_ACCURACY = 0.95
"""People disagree with themselves more often than once in twenty."""
LAST_PART_OF_EPOCH = 0.25
LARGEST_GAP = 0.2
"""Of accuracies in training and on held-out pairs: beyond it most of what was learnt holds for the former alone."""

FEWEST_PROMPTS = 30
"""Of fewer held-out prompts chance alone may part accuracies by LARGEST_GAP, with 30 two standard deviations."""

ONE_PROMPT = (
    "all test pairs are of one prompt: intervals are over users, and say nothing of other prompts"
)


class ScoredPairs(NamedTuple):
    """Pairs as they were scored: `metrics.correctness` [n], and the prompt of each [n]."""

    right: np.ndarray
    prompts: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.right.mean())

    @property
    def half_width(self) -> float | None:
        """Half of the 95% interval, clustered by prompt and not cut at 0 or 1; None where all are of one prompt."""
        return clustered_half_width(self.right, self.prompts)


def clustered_half_width(values: np.ndarray, prompts: np.ndarray) -> float | None:
    """Half of the 95% interval of the mean of values [n], clustered by prompt [n]; None where all are of one prompt."""
    if len(prompts) == 0 or (prompts == prompts[0]).all():
        return None
    return 1.96 * clustered_standard_error(values, prompts)


def unseen_above_seen(seen: ScoredPairs, unseen: ScoredPairs) -> list[str]:
    """A warning where strangers are served better than trained users, by more than the 95% interval of the gap."""
    if len(seen.right) == 0 or len(unseen.right) == 0:
        return []
    gap = unseen.accuracy - seen.accuracy
    halves = seen.half_width, unseen.half_width
    if halves[0] is None or halves[1] is None:
        return []
    # As if independent: they share no comparison, and at most some prompts.
    half = float(np.hypot(halves[0], halves[1]))
    if gap <= half:
        return []
    return [
        f"unseen users are predicted better than seen ones ({unseen.accuracy:.3f} against {seen.accuracy:.3f}, more "
        f"than the interval of +-{half:.3f}): do their comparisons give the answer away, or were they trained on?"
    ]


def of_removed_users(num_pairs: int) -> list[str]:
    """A warning where comparisons are of users who were removed from the run: they are no strangers to its weights."""
    return [
        f"{num_pairs} comparisons are of users who were removed from the run: they count among users not in the run, "
        "but the model was trained on comparisons of theirs, so these figures are not those of unseen users"
    ][: num_pairs > 0]


def both_nearly_perfect(
    train_accuracy: float | None, held_out: ScoredPairs, info: DatasetInfo
) -> list[str]:
    """A warning where train and held-out accuracy both exceed 95% on data that real people made.

    `info` is dataset.json: data with a known best accuracy are synthetic, and may be that easy.
    """
    if "bayes_accuracy" in info or train_accuracy is None or len(held_out.right) == 0:
        return []
    if min(train_accuracy, held_out.accuracy) <= SUSPICIOUS_ACCURACY:
        return []
    return [
        f"accuracy in training ({train_accuracy:.3f}) and on these pairs ({held_out.accuracy:.3f}) both exceed "
        f"{SUSPICIOUS_ACCURACY:.0%}, which people's preferences do not allow: do preferred responses differ in form?"
    ]


def learnt_by_heart(train_accuracy: float | None, held_out: ScoredPairs) -> list[str]:
    """A warning where the accuracy in training is far above that of held-out pairs, and by more than its interval.

    Of fewer than FEWEST_PROMPTS prompts it says nothing.
    """
    if train_accuracy is None or len(np.unique(held_out.prompts)) < FEWEST_PROMPTS:
        return []
    gap, half = train_accuracy - held_out.accuracy, held_out.half_width
    if half is None or gap <= max(LARGEST_GAP, half):
        return []
    return [parted(train_accuracy, held_out.accuracy, "these pairs")]


def parted(train_accuracy: float, held_out_accuracy: float, pairs: str) -> str:
    """The text of that warning; `pairs` names the held-out ones."""
    return (
        f"accuracy in training ({train_accuracy:.3f}) and on {pairs} ({held_out_accuracy:.3f}) part by "
        f"{100 * (train_accuracy - held_out_accuracy):.0f} points: the model knows its training pairs by heart. Train "
        "for fewer epochs or regularise: train.feature_dropout, optim.weight_decay, users.prior; prompt_dropout for a "
        "head that reads prompts"
    )


def no_unit_in_use(active_units: float | None) -> list[str]:
    """A warning where no latent unit varies over users: a collapsed posterior, see `diagnostics.diagnose_latent`."""
    if active_units is None or active_units > 0:
        return []
    return [
        "no latent unit varies over users, so all of them get the same rewards: the head has collapsed to one taste. "
        "Train for longer or at a higher rate, lower its kl_weight, raise swap_guidance where it has one, or take "
        "symmetry: odd and reward_form: bilinear"
    ]


def no_better_than_surface(
    pairs: ScoredPairs, length_right: np.ndarray | None, format_right: np.ndarray | None
) -> list[str]:
    """A warning for each baseline that the model does not beat by more than the 95% interval of the difference.

    Of length it is the better of "the longer wins" and "the shorter wins". The same pairs are judged by both, so the
    interval is that of the difference per pair, clustered by prompt.
    """
    baselines = {}
    if length_right is not None and len(length_right):
        longer = length_right.mean() >= 0.5
        rule = "the longer one wins" if longer else "the shorter one wins"
        baselines[rule] = length_right if longer else 1 - length_right
    if format_right is not None and len(format_right):
        baselines["first and last token"] = format_right
    warnings = []
    for rule, right in baselines.items():
        difference = pairs.right - right
        half = clustered_half_width(difference, pairs.prompts)
        if difference.mean() <= (half or 0.0):
            least = (
                "; there is no interval, as all are of one prompt"
                if half is None
                else f" by more than the interval of +-{half:.3f}"
            )
            warnings.append(
                f"accuracy {pairs.accuracy:.3f} is not above that of a baseline that does not read ({rule}: "
                f"{right.mean():.3f}){least}"
            )
    return warnings


def without_a_number(margins: np.ndarray) -> list[str]:
    """A warning where scores of some comparisons are no finite numbers."""
    num_lost = int((~np.isfinite(margins)).sum())
    return [
        f"{num_lost} of {len(margins)} comparisons have scores that are no finite numbers; they count as wrong"
    ][: num_lost > 0]


def training_accuracy(metrics: Sequence[Mapping[str, Any]], step: int) -> float | None:
    """Accuracy while training over the last quarter of an epoch before `step`: mean of those lines of metrics.jsonl.

    None where there is no such line.
    """
    lines = [row for row in metrics if row.get("accuracy") is not None and row["step"] <= step]
    if not lines:
        return None
    begin = max(row["epoch"] for row in lines) - LAST_PART_OF_EPOCH
    return float(np.mean([row["accuracy"] for row in lines if row["epoch"] > begin]))
