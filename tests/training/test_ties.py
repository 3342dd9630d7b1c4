"""Ties and soft labels: read, prepared, learnt from by each model of ties, evaluated and adapted to."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pal_ds.adaptation.blocks import UserComparisons, with_sure_labels
from pal_ds.adaptation.objective import shape_of
from pal_ds.data.collator import Collator
from pal_ds.data.draws import preferred_first
from pal_ds.data.parse import parse_record
from pal_ds.data.prepare import DataConfig, prepare
from pal_ds.data.sources import Jsonl
from pal_ds.data.tables import (
    COMPARISON_DTYPE,
    SOFT_COMPARISON_DTYPE,
    PreparedData,
    best_accuracy,
    preferences,
    targets,
)
from pal_ds.data.verification import check_tables
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.eval.evaluate import evaluate_run
from pal_ds.eval.metrics import controversial
from pal_ds.eval.tie_figures import ThreeWay, fit_threshold, three_way_losses, tie_figures
from pal_ds.heads.sufficient_statistics import MixtureStatistics
from pal_ds.inference.load_run import restore
from pal_ds.losses import PairFacts, PreferenceLoss
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.tie_models import TieModel, tie_loss, win_loss
from pal_ds.training.state import plan_of
from tests.spawn import run_command

THRESHOLD = 0.8
TASTE = np.array([1.5, -1.0, 0.5, 0.0])
MODELS: tuple[TieModel, ...] = ("rao_kupper", "davidson")


def chances(margin: float, threshold: float, model: str) -> list[float]:
    """Probability that response_1, neither, response_2 is preferred, from the papers' formulas, fp64."""
    if model == "rao_kupper":
        theta, first, second = math.exp(threshold), 1.0, math.exp(margin)
        one, two = first / (first + theta * second), second / (second + theta * first)
        return [one, 1 - one - two, two]
    parts = [math.exp(-margin / 2), threshold, math.exp(margin / 2)]
    return [part / sum(parts) for part in parts]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("threshold", [0.05, 1.0, 3.0])
def test_three_outcomes(model: TieModel, threshold: float) -> None:
    for margin in (-30.0, -2.0, 0.0, 0.7, 30.0):
        lead = torch.tensor([margin], dtype=torch.float64)
        known = chances(margin, threshold, model)
        ours = [
            float((-loss).exp())
            for loss in (
                win_loss(-lead, threshold, model),
                tie_loss(lead, threshold, model),
                win_loss(lead, threshold, model),
            )
        ]
        assert ours == pytest.approx(known, abs=1e-12)


@pytest.mark.parametrize("ties", ["half", "drop", "rao_kupper", "davidson"])
@pytest.mark.parametrize("weighting", ["last", "mean", "cumulative"])
def test_loss_in_loops(ties: TieModel, weighting: str) -> None:
    loss = PreferenceLoss("logistic", weighting, ties=ties)  # pyright: ignore[reportArgumentType]
    label, target = [1, -1, 0, 1, -1], [1.0, 0.0, 0.5, 0.7, 0.2]
    needed = torch.tensor([0.0, 0.3, 0.0, 0.0, 0.1])
    margin = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    start, end = torch.tensor([0, 1, 0, 2, 0]), torch.tensor([4, 3, 2, 4, 1])
    threshold = torch.tensor([THRESHOLD])
    margin[1, 0] = math.nan  # outside of its window
    got = loss(
        margin,
        torch.tensor(label),
        start,
        end,
        needed,
        target=torch.tensor(target),
        threshold=threshold,
    )
    for row, (y, share) in enumerate(zip(label, target, strict=True)):
        count = int(end[row] - start[row])
        weights = {
            "last": [0.0] * (count - 1) + [1.0],
            "mean": [1 / count] * count,
            "cumulative": [2 * (t + 1) / (count * (count + 1)) for t in range(count)],
        }[weighting]
        want = 0.0
        for weight, m in zip(weights, margin[row, start[row] : end[row]].tolist(), strict=True):
            r = float(needed[row])
            if ties in MODELS:
                up, down = (chances(x, THRESHOLD, ties)[2] for x in (m - r, -m - r))
                logs = [math.log(up), math.log(down), math.log(chances(m, THRESHOLD, ties)[1])]
            else:
                logs = [-math.log1p(math.exp(-x)) for x in (m - r, -m - r)]
                logs.append(0.0 if ties == "drop" else sum(logs) / 2)
            want -= weight * (logs[2] if y == 0 else share * logs[0] + (1 - share) * logs[1])
        assert float(got[row]) == pytest.approx(want, rel=1e-5), (row, ties)


def test_sure_labels_change_nothing() -> None:
    margin = torch.randn(6, 1, generator=torch.Generator().manual_seed(1))
    label = torch.tensor([1, -1, 1, -1, 1, 1])
    start, end = torch.zeros(6, dtype=torch.int64), torch.ones(6, dtype=torch.int64)
    for kind in ("logistic", "hinge", "smooth_hinge"):
        loss = PreferenceLoss(kind)
        plain = loss(margin, label, start, end)
        soft = loss(margin, label, start, end, target=(label + 1) / 2)
        torch.testing.assert_close(plain, soft, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("keys", "label", "is_soft"),
    [
        ({"y": 0}, 0, False),
        ({"tie": True}, 0, False),
        ({"tie": True, "y": 0}, 0, False),
        ({"tie": False, "y": 1}, 1, False),
        ({"probability": 0.8}, 1, True),
        ({"probability": 0.2, "tie": False}, -1, True),
        ({"probability": 0.5}, 1, True),
        ({"probability": 0.9, "y": -1}, -1, False),
    ],
)
def test_records(keys: dict[str, object], label: int, is_soft: bool) -> None:
    record = parse_record({"response_1": "a", "response_2": "b", **keys}, "here")
    assert (record.label, record.soft) == (label, is_soft)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"response_1": "a", "response_2": "b", "tie": True, "y": 1}, "'tie' is true beside y 1"),
        ({"response_1": "a", "response_2": "b", "tie": False, "y": 0}, "'tie' is false beside y 0"),
        ({"response_1": "a", "response_2": "b", "tie": False}, "missing key 'y'"),
        ({"response_1": "a", "response_2": "b", "tie": "no", "y": 1}, "must be true or false"),
        (
            {"response_1": "a", "response_2": "b", "y": 0, "margin": 2.0},
            "'margin' is 2.0 for a tie",
        ),
        ({"chosen": "a", "rejected": "b", "tie": True}, "beside 'chosen' and 'rejected'"),
        ({"response_1": "a", "response_2": "b", "y": 0.5}, "'y' is 0.5"),
    ],
)
def test_records_that_contradict_themselves(keys: dict[str, object], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_record(keys, "here")


def write_world(path: Path, num_pairs: int, seed: int, **more: object) -> Path:
    """Pairs of vectors that two users with one taste compare, undecided as Rao and Kupper have it."""
    generator = np.random.default_rng(seed)
    with open(path, "w") as stream:
        for index in range(num_pairs):
            pair = generator.normal(size=(2, 4)).round(4)
            margin = float((pair[1] - pair[0]) @ TASTE)
            y = int(generator.choice([-1, 0, 1], p=chances(margin, THRESHOLD, "rao_kupper")))
            row = {"user_id": f"u{index % 2}", "response_features": pair.tolist(), "y": y, **more}
            stream.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("ties") / "pairs.jsonl", 2400, 0)


@pytest.fixture(scope="module")
def data(pairs: Path) -> PreparedData:
    source, fractions = Jsonl(path=str(pairs)), {"dev_fraction": 0.2, "test_fraction": 0.2}
    config = DataConfig(path=str(pairs.with_name("data")), source=source, **fractions)
    return prepare(config, quiet=True)


def test_prepared(data: PreparedData) -> None:
    num_ties = int((data.comparisons["label"] == 0).sum())
    assert data.num_ties == num_ties > 200
    assert not data.is_hard and data.info["dropped"] == {}
    assert set(np.unique(targets(data.comparisons))) == {0.0, 0.5, 1.0}
    again = PreparedData.open(data.path)
    assert again.num_ties == num_ties
    # A label that became 0 since is damage, as it was when there were no ties.
    changed = data.comparisons.copy()
    changed["label"][np.flatnonzero(changed["label"])[0]] = 0
    tables = {"comparisons": changed, "response_prompt": data.response_prompt}
    with pytest.raises(UserError, match="labels 0"):
        check_tables(data.path, data.info, tables, len(data.users))


def test_soft_labels_are_prepared(tmp_path: Path) -> None:
    rows = [{"user_id": "u", "response_1": f"a {i}", "response_2": f"b {i}"} for i in range(4)]
    keys = [{"probability": 0.9}, {"y": 0}, {"y": -1, "probability": 0.3}, {"probability": 0.25}]
    lines = [json.dumps({**row, **key}) for row, key in zip(rows, keys, strict=True)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    config = DataConfig(
        path=str(tmp_path / "data"),
        source=Jsonl(path=str(tmp_path / "pairs.jsonl")),
        vocab_size=300,
    )
    data = prepare(config, quiet=True)
    order = np.argsort(data.comparisons["a"])
    assert targets(data.comparisons[order]).tolist() == pytest.approx([0.9, 0.5, 0.0, 0.25])
    assert data.info["counts"].get("soft_labels") == 2 and data.num_ties == 1
    # The likelier response is always named: no chance draws it, and every comparison can be right.
    assert "bayes_accuracy" not in data.info


def test_a_soft_label_of_one_half_prefers_neither() -> None:
    table = np.zeros(4, SOFT_COMPARISON_DTYPE)
    table["label"], table["probability"] = [1, 1, -1, 1], [0.5, 0.5, 0.2, 0.9]
    table["soft"] = [0, 1, 0, 0]
    assert preferences(table).tolist() == [1, 0, -1, 1]
    table["controversial"], table["user"], table["b"] = -1, [0, 1, 2, 3], 1
    table["b"][2:] = 2
    assert controversial(table).tolist() == [False, False, True, True]
    table["soft"] = 0
    assert best_accuracy(table) == pytest.approx((0.5 + 0.5 + 0.8 + 0.9) / 4)
    table["soft"][3] = 1
    assert best_accuracy(table) is None
    table["label"] = 0
    assert best_accuracy(table) is None


def test_a_tie_takes_no_side(data: PreparedData) -> None:
    table = np.zeros(3, data.comparisons.dtype)
    table["controversial"], table["user"], table["b"] = -1, [0, 1, 2], 1
    table["label"] = [1, 0, 1]
    assert not controversial(table).any()
    table["label"] = [1, 0, -1]
    assert controversial(table).all()
    firsts = preferred_first(data, np.flatnonzero(data.comparisons["label"] != 0)[:5])
    assert firsts.shape == (5, 2)


@pytest.fixture(scope="module")
def runs(data: PreparedData) -> dict[str, RunDirectory]:
    """A run by each model of ties, on a head that can be right."""
    made = {}
    for ties in ("drop", *MODELS):
        folder = data.path.with_name(ties)
        run_command(
            "train",
            f"--run_dir={folder}",
            f"--data.path={data.path}",
            "--head=BradleyTerry",
            f"--loss.ties={ties}",
            "--optim.learning_rate=0.05",
            "--train.ds_config=zero3_cpu",
            "--train.epochs=6",
            "--train.batch_pairs=64",
            "--train.micro_batch_pairs=64",
        )
        made[ties] = RunDirectory(folder)
        evaluate_run(made[ties], World(0, 1, torch.device("cpu")))
    return made


def figures_of(run: RunDirectory) -> dict:
    return json.loads((run.eval / "test.json").read_text())


def test_the_threshold_is_learnt(runs: dict[str, RunDirectory], data: PreparedData) -> None:
    threshold = restore(runs["rao_kupper"]).model.tie_threshold
    assert threshold is not None
    # 1,440 comparisons, a fifth of them ties: the standard error is about 0.05.
    assert float(threshold()) == pytest.approx(THRESHOLD, abs=0.15)
    weight = restore(runs["rao_kupper"]).model.head.linear_weight()
    assert weight is not None
    assert torch.nn.functional.cosine_similarity(weight, torch.from_numpy(TASTE).float(), 0) > 0.98


def test_figures(runs: dict[str, RunDirectory], data: PreparedData) -> None:
    figures = {name: figures_of(run) for name, run in runs.items()}
    labels = data.comparisons["label"][data.rows("test")]
    for name, of_run in figures.items():
        assert of_run["pairs"] == (labels != 0).sum() and of_run["accuracy"] > 0.8
        assert of_run["ties"]["pairs"] == len(labels)
        assert of_run["ties"]["ties"] == (labels == 0).sum()
        assert of_run["ties"]["learnt"] is (name in MODELS)
        # No better than a model that knows the shares alone would be no model of ties.
        shares = np.bincount(labels + 1) / len(labels)
        entropy = -(shares * np.log(shares)).sum()
        assert of_run["ties"]["log_loss"] < 0.8 * entropy, name
    best = min(of_run["ties"]["log_loss"] for of_run in figures.values())
    # The worlds's own model is not beaten by more than its sampling error.
    assert figures["rao_kupper"]["ties"]["log_loss"] < best + 0.01


def test_a_threshold_is_fitted(data: PreparedData) -> None:
    generator = np.random.default_rng(5)
    margins = 2 * generator.normal(size=4000)
    for model in MODELS:
        drawn = [generator.choice([-1.0, 0.0, 1.0], p=chances(m, 1.3, model)) for m in margins]
        found = fit_threshold(margins, np.asarray(drawn), model)
        assert found is not None and found.threshold == pytest.approx(1.3, rel=0.1)
        losses = three_way_losses(margins, np.asarray(drawn), ThreeWay(model, 1.3, True))
        want = [
            -math.log(chances(m, 1.3, model)[int(y) + 1])
            for m, y in zip(margins, drawn, strict=True)
        ]
        assert losses == pytest.approx(np.asarray(want), abs=1e-9)
    assert fit_threshold(margins, np.ones_like(margins)) is None


@pytest.mark.parametrize("model", MODELS)
def test_a_soft_label_is_not_sure(model: TieModel) -> None:
    margins, labels = np.array([0.7, -1.2, 0.4, np.inf]), np.array([1.0, -1.0, 0.0, 1.0])
    shares = np.array([0.75, 0.5, 0.5, 1.0], np.float32)
    three_way = ThreeWay(model, THRESHOLD, True)
    want = []
    for margin, label, share in zip(margins[:3], labels, shares, strict=False):
        first, neither, second = chances(margin, THRESHOLD, model)
        of_sides = share * math.log(second) + (1 - share) * math.log(first)
        want.append(-math.log(neither) if label == 0 else -of_sides)
    got = three_way_losses(margins, labels, three_way, shares=shares)
    assert got.tolist() == pytest.approx([*want, 0.0], rel=1e-6)
    figures = tie_figures(margins[:3], labels[:3], three_way, shares=shares[:3])
    assert figures["log_loss"] == pytest.approx(sum(want) / 3, rel=1e-6)
    # Of labels one half each way nothing sure is left: more of them are near 0 than of sure ones.
    found = fit_threshold(margins[:3], labels[:3], model, shares=shares[:3])
    assert found is not None and found != fit_threshold(margins[:3], labels[:3], model)


def test_training_counts_a_soft_half_as_neither(tmp_path: Path) -> None:
    lines = [
        {"user_id": "u", "response_features": [[1.0, k], [0.0, 1.0]], "probability": 0.5}
        for k in range(8)
    ]
    file = tmp_path / "raw.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = DataConfig(path=str(tmp_path / "data"), source=Jsonl(str(file)))
    data = prepare(config, quiet=True)
    batch = Collator(data)(np.arange(8), np.arange(8))
    assert batch.label.tolist() == [1] * 8
    assert batch.preferred.tolist() == [0] * 8


def test_adaptation_reads_ties(runs: dict[str, RunDirectory], tmp_path: Path) -> None:
    """What Newton minimises differs from the loss of training by a constant."""
    generator = torch.Generator().manual_seed(0)
    num_pairs, num_prototypes = 8, 3
    linear = torch.randn(2 * num_pairs, 1, num_prototypes, generator=generator)
    index = torch.arange(2 * num_pairs).view(num_pairs, 2)
    quadratic = torch.ones(1, num_prototypes, num_prototypes)
    zeros = torch.zeros(2 * num_pairs, dtype=torch.int64)
    statistics = MixtureStatistics(linear, index, quadratic, zeros, "cosine", 1.0)
    label = torch.tensor([1, -1, 0, 0, 1, -1, 0, 1])
    target = torch.where(label == 0, 0.5, (label + 1) / 2)
    target[4] = 0.8
    start = torch.zeros(num_pairs, dtype=torch.int64)
    facts = PairFacts(label, start, start + 1, 0.1 * (label != 0), torch.ones(num_pairs), target)
    owner, threshold = torch.zeros(num_pairs, dtype=torch.int64), torch.tensor([THRESHOLD])
    for ties in ("half", "drop", *MODELS):
        loss = PreferenceLoss(ties=ties)
        given = threshold if loss.has_threshold else None
        sure, comparisons = with_sure_labels(statistics, UserComparisons(owner, facts, given), ties)
        differences = []
        for seed in range(4):
            draw = torch.Generator().manual_seed(seed)
            mixture = torch.softmax(torch.randn(1, num_prototypes, generator=draw), 1)
            reward = statistics.reward(mixture.expand(num_pairs, -1))
            margin = reward[:, 1] - reward[:, 0]
            window = (facts.start, facts.end)
            of_training = loss(
                margin, label, *window, facts.required_margin, target=target, threshold=given
            )
            reward = sure.reward(mixture.expand(2 * num_pairs, -1))
            signed = comparisons.facts.label * (reward[:, 1] - reward[:, 0])[:, 0]
            value = shape_of(loss, given)(signed - comparisons.facts.required_margin)[0]
            total = (comparisons.facts.weight * value).sum()
            differences.append(float(total - of_training.sum()))
        assert max(differences) - min(differences) < 1e-4, ties
    leads = torch.linspace(-4, 4, 9, dtype=torch.float64).requires_grad_()
    shape = shape_of(PreferenceLoss(ties="davidson"), threshold.double())
    value, slope, bend = shape(leads)
    (by_autograd,) = torch.autograd.grad(value.sum(), leads, create_graph=True)
    (second,) = torch.autograd.grad(by_autograd.sum(), leads)
    torch.testing.assert_close(slope, by_autograd)
    torch.testing.assert_close(bend, second)


def test_models_of_ties_need_log_odds() -> None:
    with pytest.raises(UserError, match=r"loss\.ties: davidson needs margins in log-odds"):
        PreferenceLoss("hinge", ties="davidson")


def test_ties_alone_cannot_be_dropped() -> None:
    data: Any = SimpleNamespace(
        path="data", rows=lambda _: np.arange(3), comparisons=np.zeros(3, COMPARISON_DTYPE)
    )
    config: Any = SimpleNamespace(loss=PreferenceLoss(ties="drop"), train=None)
    with pytest.raises(UserError, match="all comparisons of its train split are ties"):
        plan_of(config, data)
