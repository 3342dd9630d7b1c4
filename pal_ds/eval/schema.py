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


class MarginHistogram(TypedDict):
    """Counts of margins, those of pairs that are ranked rightly being positive."""

    edges: list[float]
    """n + 1; the first and last bin hold what lies beyond."""
    pairs: list[int]


class TieFigures(TypedDict):
    """Comparisons with ties among them; see `tie_figures.tie_figures`."""

    pairs: int
    """All comparisons, ties among them; those of the other figures are without."""
    ties: int
    log_loss: float | None
    """Mean of -log of the probability of what each user said: one response, the other, or neither; of a soft label the
    mean of both responses' by their shares."""
    model: str | None
    threshold: float | None
    learnt: bool | None
    """False where the threshold was fitted on dev after training."""


class PairFigures(MeanFigures, CalibrationFigures):
    """Figures of one set of pairs, made by `metrics.evaluation_figures`; null for an empty set."""

    user_accuracy_mean: float | None
    worst_decile_user_accuracy: float | None
    reliability: list[ReliabilityBin] | None
    temperature: float | None
    margins: NotRequired[MarginHistogram | None]
    """Missing from evaluations of an earlier version."""
    controversial: MeanFigures | None
    length_baseline_accuracy: float | None
    format_baseline_accuracy: float | None
    bayes_accuracy: NotRequired[float | None]
    """Only for data whose choice probabilities are known, as `probability_mae`."""
    probability_mae: NotRequired[float | None]
    users: dict[str, UserFigures]
    """By user id; see `results.write_user_figures` for many users."""


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


class PrototypeExample(TypedDict):
    """A comparison on which a prototype departs from the others; see `prototype_examples`."""

    prompt: str
    likes_more: str
    """The response that this prototype likes more than the others do."""
    than: str
    margin: float
    """Of a user who is all this prototype, for `likes_more`."""
    mean_margin: float
    """Mean over the prototypes."""


class PromptCounts(TypedDict):
    """Comparisons of each prompt, ties left out; of all users, whether the run knows them or not."""

    prompts: list[int]
    """Rows of the data's prompts."""
    pairs: list[int]
    right: list[float]
    """Those that are ranked rightly; equal rewards count half."""


class EvaluationFigures(PairFigures):
    """The whole of eval/NAME.json for a set of pairs; its own entries are those of users that the run knows."""

    unknown_users: PairFigures
    ties: NotRequired[TieFigures]
    """Of sets in which users were undecided; every other figure leaves ties out."""
    train_accuracy: float | None
    diagnostics: PrototypeDiagnostics | LatentDiagnostics | None
    warnings: list[str]
    prototype_examples: NotRequired[list[list[PrototypeExample]]]
    """By prototype, the clearest first; of heads with mixtures, on texts."""
    context_flip: NotRequired[dict[str, float | None]]
    """{"all", "controversial"}, of heads that encode comparisons."""
    by_prompt: NotRequired[PromptCounts]
    """Where the request asks for it, as `compare` does."""
    dropped: NotRequired[dict[str, int]]
    """Number of dropped rows by reason, of a file."""
    prompts_seen_in_training: NotRequired[int]
    """Number of the file's prompts that training has seen; only for a file."""
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
    baselines: dict[str, RankingMeans | None] | None
    """{"random", "longest"}, choices that read nothing; `longest` is null for vectors."""
    users: dict[str, UserRankingFigures]
    """By user id."""


class BestOfNFigures(RankingFigures):
    """The whole of eval/NAME.json for `evaluate --best_of_n`; its own entries are those of users that the run knows."""

    unknown_users: RankingFigures
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


class ScratchPoint(CurvePoint):
    """Accuracy of the new users of a `CurvePoint` by regressions from scratch on the same comparisons."""

    gain: float
    """Accuracy of the run less this one's, on the same test pairs."""
    gain_ci95: list[float]


class GainOverRandom(TypedDict):
    """Accuracy of a strategy less that of random choices, on the same test pairs."""

    num_comparisons: int
    difference: float
    difference_ci95: list[float] | None
    """[low, high], paired by test pair, clustered by user or by prompt, whichever is wider; null for fewer than ten."""


class StrategyFigures(TypedDict):
    """New users whose comparisons a strategy chose."""

    curve: list[CurvePoint]
    against_random: list[GainOverRandom]
    comparisons_to_reach: float | None
    """Comparisons after which it has nine tenths of the gain that random choices have at the largest k; null for
    never."""
    random_comparisons_to_reach: float | None


class FewShotFigures(TypedDict):
    """The whole of eval/few_shot.json. It stands here because the report, which reads it, lies below adaptation."""

    step: int
    curve: list[CurvePoint]
    monotone_within_ci95: bool
    strategies: NotRequired[dict[str, StrategyFigures]]
    """By strategy, but for `random`, whose curve is `curve`."""
    seen: MeanFigures
    scratch: NotRequired[list[ScratchPoint]]
    """In the order of `curve`. Missing from evaluations of an earlier version, as `length_baseline_accuracy` is."""
    length_baseline_accuracy: NotRequired[float | None]
    """Of the new users' test pairs; null for vectors."""
    warnings: list[str]
