"""The JSON that `compare` writes, key by key: table.json."""

from typing import NotRequired, TypedDict

from pal_ds.compare.intervals import AccuracyFigure, Figure, Gain


class FewShotRow(TypedDict):
    """A method's accuracy on held-out users who were fitted to one number of comparisons."""

    num_comparisons: int
    users: int
    test_pairs: int
    bayes_accuracy: NotRequired[float]
    mean_comparisons: float
    """Fewer than `num_comparisons` where some users have not so many."""
    accuracy: AccuracyFigure
    gain: NotRequired[float]
    """Mean gain over the same users' regressions from scratch."""
    gain_ci95: NotRequired[list[float] | None]
    """Mean over runs of the ends of a run's interval."""


class Warned(TypedDict):
    """A warning, and the seeds whose runs gave it."""

    seeds: list[int]
    text: str
    folds: NotRequired[list[str]]


class MethodRow(TypedDict):
    """A method in the table: a figure under each name of COLUMNS that all its runs have."""

    runs: list[str]
    pairs: int
    """Scored comparisons, of all folds together."""
    accuracy: AccuracyFigure
    everyone: NotRequired[Figure]
    """Users whom the run knows and strangers together; where the split has strangers."""
    controversial: NotRequired[Figure]
    user_accuracy_mean: NotRequired[Figure]
    worst_decile_user_accuracy: NotRequired[Figure]
    ece: NotRequired[Figure]
    brier: NotRequired[Figure]
    bayes_accuracy: NotRequired[Figure]
    length_baseline_accuracy: NotRequired[Figure]
    users_above: NotRequired[dict[str, Figure]]
    """By number of comparisons: everyone who has more of them in the data."""
    gain: NotRequired[Gain]
    """Over the suite's reference method; of everyone."""
    few_shot: list[FewShotRow]
    warnings: list[Warned]


class ComparedData(TypedDict):
    """The prepared data that all methods were trained and scored on."""

    path: str
    hash: str


class Table(TypedDict):
    """table.json."""

    suite: str
    about: str
    data: dict[str, ComparedData]
    """By fold; under the empty name where the suite has none."""
    split: str
    seeds: list[int]
    reference: str
    methods: dict[str, MethodRow]
    """Rows of the methods whose runs are all evaluated."""
    baselines: dict[str, MethodRow]
    """Rows of what is not trained: regressions from scratch."""
    not_finished: list[str]
