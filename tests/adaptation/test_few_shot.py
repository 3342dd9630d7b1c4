"""The few-shot curve of small runs: who is fitted from what, what is written, and heads that have nobody to fit."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pal_ds.adaptation import curve_scores, few_shot, gradient, new_users
from pal_ds.adaptation import run as adapt_run_module
from pal_ds.adaptation.active import NewUsersPool, comparisons_to_reach
from pal_ds.adaptation.few_shot import (
    Curve,
    evaluate_few_shot,
    few_shot_curve,
    few_shot_lines,
    is_monotone,
)
from pal_ds.adaptation.fit import FittedUsers
from pal_ds.adaptation.new_users import FOLDER, ShardFolder, few_per_user
from pal_ds.adaptation.result import read_report
from pal_ds.adaptation.run import AdaptOptions, adapt_run
from pal_ds.data.tables import COMPARISON_DTYPE, PreparedData
from pal_ds.distributed.world import World
from pal_ds.errors import UserError
from pal_ds.eval import results
from pal_ds.eval.evaluate import evaluate_run, summary_line
from pal_ds.eval.results import split_request
from pal_ds.inference import readers as reading_module
from pal_ds.inference.fitted_to import RECORD
from pal_ds.inference.load_run import OpenRun, restore
from pal_ds.inference.mixtures import user_mixtures
from pal_ds.inference.posterior_file import POSTERIOR, read_posterior, write_posterior
from pal_ds.inference.readers import known_users, reader_of
from pal_ds.runs.run_dir import RunDirectory
from pal_ds.users import UserTable
from pal_ds.users.files import USER_FILES
from pal_ds.users.ids import UserIds
from slurm import user_shards
from tests.near import margin_bound, room
from tests.spawn import run_command
from tests.tiny import LLAMA, data_options, write_pairs

ALONE = World(0, 1, torch.device("cpu"))
RECIPES = {
    # One score per position, all of them weighed, and batches of whole prompts.
    "PalA": [
        "--head.num_prototypes=3",
        "--loss.token_weighting=cumulative",
        "--train.shuffle_unit=item",
    ],
    "BradleyTerry": [],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    folder = tmp_path_factory.mktemp("few_shot")
    pairs = write_pairs(folder / "pairs.jsonl", 144, num_users=24)
    for head, options in RECIPES.items():
        run_command(
            "train",
            *data_options(folder, pairs),
            "--data.dev_fraction=0",
            "--data.test_fraction=0.2",
            "--data.unseen_user_fraction=0.5",
            f"--backbone.architecture={json.dumps(LLAMA)}",
            f"--head={head}",
            "--train.batch_pairs=16",
            "--optim.learning_rate=3e-3",
            "--train.ds_config=zero0",
            *options,
            f"--run_dir={folder / head}",
        )
    return {head: RunDirectory(folder / head) for head in RECIPES}


@pytest.fixture(scope="module")
def restored(runs: dict[str, RunDirectory]) -> OpenRun:
    return restore(runs["PalA"])


def users_of(data: PreparedData, split: str) -> np.ndarray:
    return np.unique(data.comparisons["user"][data.rows(split)])


def strays(data: PreparedData) -> np.ndarray:
    """Users with pairs in unseen_train and none in unseen_test."""
    return np.setdiff1d(users_of(data, "unseen_train"), users_of(data, "unseen_test"))


def test_everyone_is_fitted_from_their_own_pairs(
    restored: OpenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = restored.data
    owners = users_of(data, "unseen_test")
    assert len(strays(data)) >= 1 and len(owners) >= 3
    fit, calls = curve_scores.fit_users, []

    def recording(*arguments: Any, **options: Any) -> FittedUsers:
        calls.append(arguments)
        return fit(*arguments, **options)

    monkeypatch.setattr(curve_scores, "fit_users", recording)
    few_shot_curve(restored, [0, 1, 100], ALONE, seeds=(0, 1))
    ((_, _, (rows, owner, num_users)),) = calls
    assert num_users == 3 * 2 * len(owners)
    assert np.array_equal(owners[owner % len(owners)], data.comparisons["user"][rows])
    # With room for all pairs, each pair of theirs is used once per draw.
    theirs = data.rows("unseen_train")
    theirs = theirs[np.isin(data.comparisons["user"][theirs], owners)]
    everything = rows[owner >= 4 * len(owners)]
    assert np.array_equal(np.sort(everything), np.repeat(theirs, 2))


def test_users_without_test_pairs_change_nothing(restored: OpenRun) -> None:
    table = np.array(restored.data.comparisons)
    stray = np.isin(table["user"], strays(restored.data))
    without = replace(restored, data=replace(restored.data, comparisons=table[~stray]))
    curve = few_shot_curve(restored, [0, 2], ALONE, seeds=(0, 1))
    assert few_shot_curve(without, [0, 2], ALONE, seeds=(0, 1)).rows == curve.rows


def test_regressions_from_scratch_stand_beside_the_run(runs: dict[str, RunDirectory]) -> None:
    """On the same draws and pairs: of no comparison nothing is known, and the gain is the difference of accuracies."""
    figures = evaluate_few_shot(runs["BradleyTerry"], [0, 2, 4], 3)
    points = figures.get("scratch", [])
    assert points[0]["accuracy"] == 0.5
    for point, scratch in zip(figures["curve"], points, strict=True):
        assert scratch["gain"] == pytest.approx(point["accuracy"] - scratch["accuracy"])
        low, high = scratch["gain_ci95"]
        assert low < scratch["gain"] < high and high - low < 1
        for key in ("num_comparisons", "mean_comparisons", "users", "test_pairs"):
            assert point[key] == scratch[key]
    lengths = figures.get("length_baseline_accuracy")
    assert lengths is not None and 0 <= lengths <= 1
    lines = "\n".join(few_shot_lines(figures))
    assert "   2 comparisons, regression from scratch: accuracy " in lines
    assert f"the longer text wins: accuracy {lengths:.4f}" in lines
    assert json.loads((runs["BradleyTerry"].eval / "few_shot.json").read_text()) == figures


def test_no_user_to_fit_and_test_is_refused(restored: OpenRun) -> None:
    table = np.array(restored.data.comparisons)
    kept = np.isin(table["user"], strays(restored.data))
    with pytest.raises(UserError, match="no unseen user has pairs in both"):
        few_shot_curve(
            replace(restored, data=replace(restored.data, comparisons=table[kept])), [1], ALONE
        )


@pytest.mark.parametrize(("values", "num_draws"), [([], 20), ([-1], 20), ([0, 1], 0)])
def test_values_that_say_nothing_are_refused(
    runs: dict[str, RunDirectory], values: list[int], num_draws: int
) -> None:
    with pytest.raises(UserError, match="must be"):
        evaluate_few_shot(runs["PalA"], values, num_draws)


def test_the_solver_is_the_persons_choice(
    runs: dict[str, RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, solvers = curve_scores.fit_users, []

    def recording(*arguments: Any, solver: Any, **options: Any) -> FittedUsers:
        solvers.append(solver)
        return fit(*arguments, solver=solver, **options)

    monkeypatch.setattr(curve_scores, "fit_users", recording)
    evaluate_few_shot(runs["PalA"], [2], 1, solver="reference")
    evaluate_few_shot(runs["PalA"], [2], 1)
    assert solvers == ["reference", "auto"]
    with pytest.raises(UserError, match=r"--solver newton: this run's head gives no statistics"):
        evaluate_few_shot(runs["PalA"], [0], 1, solver="newton")
    with pytest.raises(UserError, match=r"--solver adam: this run's head has no users to fit"):
        evaluate_few_shot(runs["BradleyTerry"], [0], 1, solver="adam")


def test_data_without_held_out_users_are_refused_before_a_model_is_loaded(
    restored: OpenRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = np.array(restored.data.comparisons)
    kept = np.isin(table["user"], strays(restored.data))
    opened = replace(restored, data=replace(restored.data, comparisons=table[kept]))
    monkeypatch.setattr(few_shot, "with_weights", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=r"data\.unseen_user_fraction above 0"):
        evaluate_few_shot(opened, [1], 1)


def test_no_comparisons_leave_the_mixture_of_strangers(restored: OpenRun) -> None:
    """Their mean of mixtures, which is not that of the mean logits: no accuracy of so small a run tells them apart."""
    told = []

    class Listening(World):
        def from_rank_zero(self, decide: Callable[[], Any]) -> Any:
            told.append(decide())
            return told[-1]

    few_shot_curve(restored, [0, 8], Listening(0, 1, torch.device("cpu")))
    population = user_mixtures(restored.model.head, restored.users)[-1:]
    without, fitted = told[-1].chunk(2)
    assert torch.equal(without, population.expand_as(without))
    assert not torch.equal(fitted, population.expand_as(fitted))


class SecondRank(World):
    """Hears that rank 0 found no numbers."""

    def from_rank_zero(self, decide: Callable[[], Any]) -> Any:
        found = decide()
        assert isinstance(found, torch.Tensor)
        return torch.full_like(found, torch.nan)


def test_ranks_score_what_rank_zero_fitted(restored: OpenRun) -> None:
    """Else two that differ in a last digit would not agree on which draws are alike, and wait for each other."""
    told = few_shot_curve(restored, [0, 8], SecondRank(0, 1, torch.device("cpu")), seeds=(0, 1))
    own = few_shot_curve(restored, [0, 8], ALONE, seeds=(0, 1))
    assert not told.right.any() and own.right.any(1).all()


def room_of_accuracy(run: RunDirectory) -> float:
    """Between `evaluate` and a curve on unseen_test, which read texts in batches of other shapes; see `near.py`."""
    restored = restore(run)
    rows, known = restored.data.rows("unseen_test"), known_users(restored, None)
    table_rows = known.table_rows(restored.data)
    forwards = reader_of(restored, restored.data, rows, table_rows, ALONE).forwards(ALONE)
    margins, rewards = (read(rows, known.mixtures) for read in (forwards.margins, forwards.rewards))
    return room(margins, margin_bound(rewards), (1.0, 1.0)).accuracy


def test_curve_is_written(runs: dict[str, RunDirectory]) -> None:
    run = runs["PalA"]
    figures = evaluate_few_shot(run, [0, 2, 8], 2)
    curve = figures["curve"]
    assert [row["num_comparisons"] for row in curve] == [0, 2, 8]
    for row in curve:
        assert row["accuracy"] == pytest.approx(np.mean(row["accuracy_by_seed"]))
        assert len(row["accuracy_by_seed"]) == 2
        low, high = row["accuracy_ci95"]
        assert 0 <= low < row["accuracy"] < high <= 1
        # How much each user really had to give, and on how many the figure stands.
        assert 0 <= row["mean_comparisons"] <= row["num_comparisons"]
        assert row["users"] > 0
        assert row["test_pairs"] == curve[0]["test_pairs"] > 0
    assert curve[0]["mean_comparisons"] == 0 < curve[1]["mean_comparisons"]
    # Nobody's comparisons were drawn: strangers as `evaluate` serves them, in every draw.
    strangers = evaluate_run(run, ALONE, request=split_request("unseen_test"))["unknown_users"]
    (found,) = set(curve[0]["accuracy_by_seed"])
    assert found == pytest.approx(strangers["accuracy"], abs=room_of_accuracy(run))
    seen = evaluate_run(run, ALONE, request=split_request("test"))
    assert figures["seen"] == {key: seen[key] for key in ("pairs", "accuracy", "accuracy_ci95")}
    written = json.loads((run.eval / "few_shot.json").read_text())
    assert written == {"step": run.complete_steps()[-1], **figures}
    assert (
        few_shot_lines(figures)[0]
        == f"{curve[0]['users']} users, {curve[0]['test_pairs']} test pairs"
    )


def test_a_head_without_users_is_the_same_at_every_k(runs: dict[str, RunDirectory]) -> None:
    run = runs["BradleyTerry"]
    figures = evaluate_few_shot(run, [0, 1, 4], 2)
    accuracies = {accuracy for row in figures["curve"] for accuracy in row["accuracy_by_seed"]}
    assert len(accuracies) == 1
    assert figures["monotone_within_ci95"]
    found = evaluate_run(run, ALONE, request=split_request("unseen_test"))
    (accuracy,) = accuracies
    wanted = pytest.approx(found["unknown_users"]["accuracy"], abs=room_of_accuracy(run))
    assert accuracy == wanted
    assert found["diagnostics"] is None


def curve_of(right: list[list[float]], users: list[int]) -> Curve:
    rows = [{"num_comparisons": k} for k in range(len(right))]
    return Curve(rows, np.asarray(right, float), np.arange(len(users)), np.asarray(users))


def test_a_fall_beyond_its_interval_is_not_monotone() -> None:
    users = list(range(8))
    rise, fall = [0.0, 1] * 4, [0.0, 0, 0, 1] * 2
    # One pair in four is lost for good: its interval is +-1.96 sqrt(8 / 7 * 1.5 / 64) = 0.32.
    assert is_monotone(curve_of([rise, fall], users))
    # Sixteen times as many pairs: a quarter of the interval.
    assert not is_monotone(curve_of([rise * 16, fall * 16], list(range(128))))
    assert is_monotone(curve_of([fall * 16, rise * 16], list(range(128))))
    # The same pairs of two users who both lose, or of whom one loses all: users are few, or not alike.
    assert is_monotone(curve_of([[1.0] * 8, [1.0] * 4 + [0.0] * 4], [0] * 4 + [1] * 4))
    # Small falls add up: each of them is within its interval.
    steps = [[1.0] * 32 + [0.0] * 32 for _ in range(4)]
    for number, row in enumerate(steps):
        row[: 2 * number] = [0.0] * (2 * number)
    assert is_monotone(curve_of(steps[:2], list(range(64))))
    assert is_monotone(curve_of(steps[1:3], list(range(64))))
    assert not is_monotone(curve_of(steps, list(range(64))))


def test_interval_is_over_users_and_draws() -> None:
    """Two draws of four pairs of two users: means 1, 1/2 for one user and 0, 1/2 for the other."""
    right = np.array([[[1.0, 1, 0, 1], [1.0, 0, 0, 0]]])
    table = np.zeros(4, COMPARISON_DTYPE)
    table["user"], table["a"], table["probability"] = [3, 3, 4, 4], range(4), np.nan
    data: Any = SimpleNamespace(comparisons=table, response_prompt=np.arange(4))
    curve = few_shot._curve(data, np.arange(4), right, [(2, 0), (2, 1)], [np.arange(4)] * 2)
    (row,) = curve.rows
    assert curve.right.tolist() == [[1, 0.5, 0, 0.5]]
    assert (row["accuracy"], row["accuracy_by_seed"]) == (0.5, [0.75, 0.25])
    assert (row["users"], row["mean_comparisons"]) == (2, 2)
    # Residuals of the users sum to +1/2 and -1/2: variance 2 (1/4 + 1/4) / 16, wider than by prompt.
    half = 1.96 * np.sqrt(2 * 0.5) / 4
    assert row["accuracy_ci95"] == pytest.approx([0.5 - half, 0.5 + half])


def test_of_one_prompt_the_interval_is_over_users() -> None:
    """Forty users of a pair each, half of them right: by the only prompt there would be no spread, or no interval."""
    table = np.zeros(40, COMPARISON_DTYPE)
    table["user"], table["probability"] = range(40), np.nan
    data: Any = SimpleNamespace(comparisons=table, response_prompt=np.zeros(1, np.int64))
    right = np.repeat([1.0, 0.0], 20)[None, None]
    curve = few_shot._curve(data, np.arange(40), right, [(2, 0)], [np.arange(40)])
    half = 1.96 * 0.5 / np.sqrt(39)
    assert curve.rows[0]["accuracy_ci95"] == pytest.approx([0.5 - half, 0.5 + half])
    assert curve.num_clusters == 40


def test_split_of_strangers_has_every_key(runs: dict[str, RunDirectory]) -> None:
    """All users of unseen_test are unknown to the run: the top level is an empty set."""
    run = runs["PalA"]
    figures = evaluate_run(run, ALONE, request=split_request("unseen_test"))
    unknown = figures["unknown_users"]
    assert unknown["pairs"] > 0
    assert unknown.keys() <= figures.keys()
    assert (figures["pairs"], figures["users"]) == (0, {})
    assert figures["accuracy"] is None and figures["accuracy_ci95"] is None
    assert "unseen_test: 0 pairs; users not in the run" in summary_line("unseen_test", figures)
    seen = evaluate_run(run, ALONE, request=split_request("test"))
    assert seen["pairs"] > 0
    assert seen["unknown_users"]["pairs"] == 0
    assert seen["unknown_users"]["ece"] is None
    assert seen.keys() == {key for key in figures if key in seen}


def test_draw_does_not_depend_on_other_users(restored: OpenRun) -> None:
    """The same user in another row of other data draws the same of their comparisons."""
    data = restored.data
    rows = np.arange(len(data.comparisons))
    users = data.comparisons["user"]
    num_users = len(data.users)
    moved = np.array(data.comparisons)
    moved["user"] = num_users - 1 - users
    renumbered = replace(data, comparisons=moved, users=data.users[::-1])
    drawn = few_per_user(data, rows, 2, seed=7)
    assert np.array_equal(few_per_user(renumbered, rows, 2, seed=7), drawn)
    own = rows[users == 5]
    assert np.array_equal(few_per_user(data, own, 2, seed=7), drawn[users[drawn] == 5])
    assert np.bincount(users[drawn], minlength=num_users).tolist() == [2] * num_users
    assert not np.array_equal(few_per_user(data, rows, 2, seed=8), drawn)
    # Two users of equally many comparisons draw different ones.
    places = {tuple(np.searchsorted(rows[users == u], drawn[users[drawn] == u])) for u in range(24)}
    assert len(places) > 1
    assert len(few_per_user(data, rows[:0], 2, seed=7)) == 0


def test_adapted_users_serve_their_own_test_pairs(
    runs: dict[str, RunDirectory], tmp_path: Path
) -> None:
    run = runs["PalA"]
    report = adapt_run(run, tmp_path / "users", AdaptOptions(num_pairs=3))
    data = PreparedData.open(restore(run).data.path)
    assert set(report["users"]) == {data.users[row] for row in users_of(data, "unseen_train")}
    assert max(user["pairs"] for user in report["users"].values()) == 3
    assert all(sum(user["mixture"]) == pytest.approx(1) for user in report["users"].values())
    figures = evaluate_run(
        run, ALONE, users=tmp_path / "users", request=split_request("unseen_test", "new")
    )
    both = np.intersect1d(users_of(data, "unseen_train"), users_of(data, "unseen_test"))
    assert set(figures["users"]) == {data.users[row] for row in both}


def files_in(folder: Path) -> dict[str, bytes]:
    """Their bytes; of the tensors' file those after its header, which lists its metadata in any order."""
    assert all(path.is_file() for path in folder.iterdir()), "shards were left"
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    tensors = found["users.safetensors"]
    found["users.safetensors"] = tensors[8 + int.from_bytes(tensors[:8], "little") :]
    return found


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shards of a user or two, and how many users each call of `fit_users` was given."""
    fit, calls = adapt_run_module.fit_users, []

    def recording(*arguments: Any, **options: Any) -> FittedUsers:
        calls.append(arguments[2].num_users)
        return fit(*arguments, **options)

    monkeypatch.setattr(adapt_run_module, "fit_users", recording)
    monkeypatch.setattr(new_users, "PAIRS_PER_SHARD", 6)
    monkeypatch.setattr(gradient, "NUM_STEPS", 10)
    return calls


def stop_after(monkeypatch: pytest.MonkeyPatch, num_shards: int) -> None:
    write = ShardFolder.write

    def dying(self: ShardFolder, number: int, shard: Any) -> None:
        if number == num_shards:
            raise KeyboardInterrupt
        write(self, number, shard)

    monkeypatch.setattr(ShardFolder, "write", dying)


def test_a_fit_that_was_cut_off_goes_on_to_the_same_bytes(
    runs: dict[str, RunDirectory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_shards: list[int],
) -> None:
    run, whole, cut = runs["PalA"], tmp_path / "whole", tmp_path / "cut"
    adapt_run(run, whole, AdaptOptions(num_pairs=3))
    num_shards, num_users = len(small_shards), sum(small_shards)
    assert num_shards >= 5 and max(small_shards) == 2
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        adapt_run(run, cut, AdaptOptions(num_pairs=3))
    assert {path.name for path in cut.iterdir()} == {FOLDER}
    # Shards that a bad disk spoilt are made again.
    shards = sorted(cut.glob("fitting/*/*.safetensors"))
    assert len(shards) == 3
    shards[1].write_bytes(shards[1].read_bytes()[:100])
    flipped = bytearray(shards[2].read_bytes())
    flipped[-1] ^= 1
    shards[2].write_bytes(flipped)
    small_shards.clear()
    adapt_run(run, cut, AdaptOptions(num_pairs=3))
    assert len(small_shards) == num_shards - 1
    assert files_in(cut) == files_in(whole)
    report = json.loads((whole / "report.json").read_text())
    assert len(report["users"]) == num_users
    # What is whole is taken as it is, also where its maker was killed before it had tidied up.
    (whole / FOLDER / report["inputs"]).mkdir(parents=True)
    small_shards.clear()
    assert adapt_run(run, whole, AdaptOptions(num_pairs=3)) == report
    assert not small_shards
    assert files_in(cut) == files_in(whole)
    with pytest.raises(UserError, match="not empty: it holds users who were fitted from other"):
        adapt_run(run, whole, AdaptOptions(num_pairs=2))
    (cut / "report.json").unlink()
    with pytest.raises(UserError, match="not empty"):
        adapt_run(run, cut, AdaptOptions(num_pairs=3))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (b"", "not valid JSON"),
        (b"[]", "it is [], no dict"),
        (
            b'{"step": 1, "pairs": 1, "accuracy_on_these_pairs": 1, "users": "../x"}',
            "'../x' is not",
        ),
        (b'{"step": 1, "pairs": 1, "accuracy_on_these_pairs": 1, "users": {"a": 1}}', "it.users.a"),
        (b'{"step": 1, "pairs": 1, "accuracy_on_these_pairs": 1, "users": "report.parquet"}', ""),
    ],
)
def test_a_damaged_report(tmp_path: Path, damage: bytes, reason: str) -> None:
    (tmp_path / "report.json").write_bytes(damage)
    (tmp_path / "report.parquet").write_bytes(b"PAR1 but nothing of it")
    with pytest.raises(UserError, match=r"report\.json: .*Delete .* and fit again") as caught:
        read_report(tmp_path)
    assert reason in str(caught.value)


def test_shards_of_other_inputs_are_not_taken(
    runs: dict[str, RunDirectory],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_shards: list[int],
) -> None:
    run, out = runs["PalA"], tmp_path / "users"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        stop_after(patch, 3)
        adapt_run(run, out, AdaptOptions(num_pairs=3))
    small_shards.clear()
    report = adapt_run(run, out, AdaptOptions(num_pairs=3, solver="reference"))
    assert sum(small_shards) == len(report["users"])
    assert files_in(out).keys() == {*USER_FILES, RECORD, POSTERIOR, "report.json"}


def test_newton_is_refused_before_any_text_is_read(
    runs: dict[str, RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(adapt_run_module, "opened_pairs")
    with pytest.raises(UserError, match="--solver newton: this run's head gives no statistics"):
        adapt_run(runs["PalA"], tmp_path / "users", AdaptOptions(solver="newton"))
    assert not (tmp_path / "users").exists()


def test_texts_that_do_not_fit_into_memory_together_are_encoded_by_shard(
    runs: dict[str, RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, encode, calls = runs["PalA"], reading_module.encode_once, []

    def recording(*arguments: Any) -> Any:
        calls.append(arguments[2])
        return encode(*arguments)

    monkeypatch.setattr(reading_module, "encode_once", recording)
    monkeypatch.setattr(gradient, "NUM_STEPS", 10)
    together = adapt_run(run, tmp_path / "together", AdaptOptions())
    assert len(calls) == 1
    monkeypatch.setattr(new_users, "POSITIONS_PER_SHARD", 100)
    apart = adapt_run(run, tmp_path / "apart", AdaptOptions())
    assert len(calls) > 3
    for user, entry in together["users"].items():
        assert entry["pairs"] == apart["users"][user]["pairs"]
        assert entry["mixture"] == pytest.approx(apart["users"][user]["mixture"], abs=1e-3)


def test_many_users_are_reported_in_a_table_beside(
    runs: dict[str, RunDirectory], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "USERS_IN_PARQUET_ABOVE", 3)
    report = adapt_run(runs["PalA"], tmp_path / "users", AdaptOptions())
    path = tmp_path / "users" / "report.json"
    written = json.loads(path.read_text())
    assert written == {**report, "users": "report.parquet"}
    assert read_report(tmp_path / "users") == report
    entry = next(iter(report["users"].values()))
    assert entry.keys() == {
        "pairs",
        "accuracy_on_these_pairs",
        "accuracy_before",
        "accuracy_left_out",
        "mixture",
        "margin_std_before",
        "margin_std",
    }
    # The shards of a job array are put together whatever form their reports have.
    for number in (0, 1):
        shutil.copytree(tmp_path / "users", tmp_path / "array" / "shards" / str(number))
    shard = tmp_path / "array" / "shards" / "1"
    table = UserTable.load(shard)
    posterior = read_posterior(shard, len(table.ids), 3)
    assert posterior is not None
    table.ids = UserIds.of(f"{user}-too" for user in table.ids)
    table.save(shard)
    write_posterior(shard, posterior.covariance)
    user_shards.merge(tmp_path / "array")
    both = read_posterior(tmp_path / "array", 2 * len(table.ids), 3)
    assert both is not None and torch.equal(both.covariance, posterior.covariance.repeat(2, 1, 1))
    merged = read_report(tmp_path / "array")
    assert merged["pairs"] == 2 * report["pairs"]
    assert merged["accuracy_on_these_pairs"] == pytest.approx(report["accuracy_on_these_pairs"])
    assert merged["users"] == report["users"]


def test_strategies_read_no_label_before_it_is_asked(restored: OpenRun) -> None:
    """Two comparisons are chosen alike whatever the answers to all others are; a strategy asks what random may."""
    pool, draws = _pool(restored), [(1, 0), (2, 0), (9, 0)]
    first, second, everything = pool.drawn("bald", draws)
    assert set(first) < set(second) and sorted(everything) == sorted(pool.rows)
    owner = restored.data.comparisons["user"]
    assert (np.bincount(owner[second])[np.unique(owner[pool.rows])] == 2).all()
    table = restored.data.comparisons.copy()
    unread = np.setdiff1d(pool.rows, first)
    table["label"][unread] *= -1
    data = replace(restored.data, comparisons=table)
    turned = _pool(replace(restored, data=data)).drawn("bald", draws)
    assert [*map(sorted, turned[:2])] == [sorted(first), sorted(second)]


def _pool(restored: OpenRun) -> NewUsersPool:
    data = restored.data
    rows = data.rows("unseen_train")
    owners = np.unique(data.comparisons["user"][rows])
    table_rows = np.full(len(data.users), -1, np.int64)
    table_rows[owners] = np.arange(len(owners))
    reader = reader_of(restored, data, rows, table_rows, ALONE, encode_ahead=True)
    return NewUsersPool(restored, reader, rows, len(owners), "auto")


def test_strategies_have_curves_beside_random(runs: dict[str, RunDirectory]) -> None:
    figures = evaluate_few_shot(runs["PalA"], [0, 2, 9], 1, strategies=("thompson",))
    assert figures["strategies"].keys() == {"thompson"}
    for own in figures["strategies"].values():
        assert [point["num_comparisons"] for point in own["curve"]] == [0, 2, 9]
        # Nobody known, and everything answered: the same users whoever chose.
        first, _, last = own["against_random"]
        assert first["difference"] == last["difference"] == 0.0
    assert any("chosen by thompson" in line for line in few_shot_lines(figures))
    with pytest.raises(UserError, match="no posterior"):
        evaluate_few_shot(runs["BradleyTerry"], [0, 2], 2, strategies=("bald",))


def test_comparisons_that_a_gain_takes() -> None:
    counts, random = [0, 10, 20], np.array([0.5, 0.6, 0.7])
    assert comparisons_to_reach(counts, np.array([0.5, 0.68, 0.7]), random) == pytest.approx(10.0)
    assert comparisons_to_reach(counts, random, random) == pytest.approx(18.0)
    assert comparisons_to_reach(counts, np.full(3, 0.5), random) is None
    assert comparisons_to_reach(counts, random, np.full(3, 0.5)) is None
