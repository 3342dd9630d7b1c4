"""The JSON that evaluations write: eval/NAME.json of pairs, of best of n, and eval/few_shot.json, key by key."""

from typing import NotRequired, TypedDict


class MeanFigures(TypedDict):
    """Accuracy over some pairs; null where there are none."""

    pairs: int
    accuracy: float | None
    accuracy_ci95: list[float] | None
    """[low, high]."""


class CalibrationFigures(TypedDict):
    """Distance of stated confidence from the truth; see `metrics.Calibration`."""

    ece: float | None
    brier: float | None


class UserFigures(CalibrationFigures):
    """Figures of one user's pairs."""

    pairs: int
    accuracy: float


class ReliabilityBin(TypedDict):
    """A point of the reliability diagram."""

    confidence: float
    accuracy: float
    pairs: int


class PairFigures(MeanFigures, CalibrationFigures):
    """Figures of one set of pairs, made by `metrics.evaluation_figures`; null for an empty set."""

    user_accuracy_mean: float | None
    worst_decile_user_accuracy: float | None
    reliability: list[ReliabilityBin] | None
    temperature: float | None
    controversial: MeanFigures | None
    length_baseline_accuracy: float | None
    format_baseline_accuracy: float | None
    bayes_accuracy: NotRequired[float | None]
    """Only for data whose choice probabilities are known, as `probability_mae`."""
    probability_mae: NotRequired[float | None]
    users: dict[str, UserFigures]
    """By user id; see `results.write_user_figures` for many users."""


class SplitFigures(PairFigures):
    """Figures of users that the run knows, and of strangers."""

    unknown_users: PairFigures


class PrototypeDiagnostics(TypedDict):
    """Use of the prototypes by a run's own users; see `diagnostics.diagnose`."""

    users: int
    prototypes: int
    user_entropy_mean: float | None
    effective_prototypes: float | None
    effective_prototypes_per_user: float | None
    prototype_shares: list[float] | None
    prototype_distances: list[list[float]] | None
    distance_min: float | None
    distance_mean: float | None
    cosine_max: float | None


class LatentDiagnostics(TypedDict):
    """Use of the latent units by a head that encodes comparisons; see `diagnostics.diagnose_latent`."""

    users: int
    latent_units: int
    active_units: float | None


class Findings(TypedDict):
    """Entries that `findings.findings` adds to the figures."""

    train_accuracy: float | None
    diagnostics: PrototypeDiagnostics | LatentDiagnostics | None
    warnings: list[str]


class OptionalFigures(TypedDict, total=False):
    """Entries that only some heads and sets have."""

    context_flip: dict[str, float | None]
    """{"all", "controversial"}, of heads that encode comparisons."""
    dropped: dict[str, int]
    """Number of dropped rows by reason, of a file."""
    prompts_seen_in_training: int
    """Number of the file's prompts that training has seen; only for a file."""


class EvaluationFigures(SplitFigures, Findings, OptionalFigures):
    """The whole of eval/NAME.json for a set of pairs."""

    step: int
    adapted_users: int


class RankingMeans(TypedDict):
    """Means of the figures of best of n; see `best_of_n_metrics.best_of_n_figures`."""

    top1: float
    regret: float
    regret_normalised: float
    kendall_tau_b: float


class UserRankingFigures(RankingMeans):
    """Best of n over the lists of one user."""

    lists: int


class RankingBaselines(TypedDict):
    """Best of n of choices that read nothing."""

    random: RankingMeans
    longest: RankingMeans | None


class RankingFigures(TypedDict):
    """Best of n over one set of lists; null for an empty set."""

    lists: int
    indifferent: int
    candidates_mean: float | None
    top1: float | None
    top1_ci95: list[float] | None
    regret: float | None
    regret_ci95: list[float] | None
    regret_normalised: float | None
    regret_normalised_ci95: list[float] | None
    kendall_tau_b: float | None
    kendall_tau_b_ci95: list[float] | None
    baselines: RankingBaselines | None
    users: dict[str, UserRankingFigures]
    """By user id."""


class SplitRankingFigures(RankingFigures):
    """Best of n over the lists of users that the run knows, and of strangers."""

    unknown_users: RankingFigures


class BestOfNFigures(SplitRankingFigures):
    """The whole of eval/NAME.json for `evaluate --best_of_n`."""

    dropped: NotRequired[dict[str, int]]
    """Number of dropped lists ("lists") and rows by reason, of a file."""
    step: int


class CurvePoint(TypedDict):
    """Accuracy of new users after `num_comparisons` comparisons each."""

    num_comparisons: int
    mean_comparisons: float
    """Mean over users; a user may have fewer."""
    accuracy: float
    accuracy_ci95: list[float]
    accuracy_by_seed: list[float]
    users: int
    test_pairs: int
    bayes_accuracy: NotRequired[float]


class FewShotFigures(TypedDict):
    """The whole of eval/few_shot.json. It stands here because the report, which reads it, lies below adaptation."""

    step: int
    curve: list[CurvePoint]
    monotone_within_ci95: bool
    seen: MeanFigures
    warnings: list[str]
