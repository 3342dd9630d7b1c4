"""`pal-ds compare` on a tiny suite: its table is what `evaluate` says, a killed one goes on, finished runs are kept."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pal_ds.adaptation.few_shot import evaluate_few_shot
from pal_ds.cli.main import build_parser
from pal_ds.cli.training_commands import suite_of
from pal_ds.compare.page import page
from pal_ds.compare.table import tabulate
from pal_ds.distributed.world import World
from pal_ds.eval.evaluate import evaluate_run
from pal_ds.eval.results import split_request
from pal_ds.runs.run_dir import RunDirectory
from tests.compare.cases import METHODS, NUM_SEEDS, write_suite
from tests.warm import KILLED, WarmParent

ALONE = World(0, 1, torch.device("cpu"))
START = "tests.compare.cases:start"


def table_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "table.json").read_text())


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    """(size, time of last change) of each file."""
    stats = {path: path.stat() for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def few_shot_again(run: RunDirectory) -> list[dict[str, Any]]:
    evaluate_few_shot(run, [0, 4], 2)
    return json.loads((run.eval / "few_shot.json").read_text())["curve"]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("compare"))


@pytest.fixture(scope="module")
def out(warm: WarmParent, suite: Path) -> Path:
    """The suite, run through once."""
    out = suite.parent / "out"
    assert warm(START, suite, out, suite.parent / "log") == [0]
    return out


@pytest.mark.usefixtures("one_thread")
def test_the_table_is_what_evaluate_says_of_each_run(out: Path) -> None:
    table = table_of(out)
    assert list(table["methods"]) == list(METHODS) and table["not_finished"] == []
    accuracies = []
    for method, row in table["methods"].items():
        runs = [RunDirectory(out / "runs" / method / f"seed_{seed}") for seed in range(NUM_SEEDS)]
        assert row["runs"] == [str(run.path) for run in runs]
        figures = [evaluate_run(run, ALONE, request=split_request("test", "again")) for run in runs]
        for name in ("accuracy", "user_accuracy_mean", "worst_decile_user_accuracy", "ece"):
            assert row[name]["by_seed"] == [one[name] for one in figures]
            assert row[name]["mean"] == pytest.approx(np.mean([one[name] for one in figures]))
        assert row["pairs"] == figures[0]["pairs"] > 0
        ends = np.mean([one["accuracy_ci95"] for one in figures], axis=0)
        assert row["accuracy"]["ci95_within_seed"] == pytest.approx(ends)
        curves = [few_shot_again(run) for run in runs]
        for index, point in enumerate(row["few_shot"]):
            assert point["num_comparisons"] == [0, 4][index]
            assert point["accuracy"]["by_seed"] == [curve[index]["accuracy"] for curve in curves]
        accuracies.append(row["accuracy"]["mean"])
    # Two camps: who knows no users is right about half of the time.
    assert accuracies[1] > accuracies[0] + 0.1


def test_page_and_pictures(out: Path) -> None:
    table, text = table_of(out), (out / "table.md").read_text()
    for method, row in table["methods"].items():
        low, high = row["accuracy"]["ci95_within_seed"]
        line = (
            f"| {method} | {row['pairs']} | {row['accuracy']['mean']:.3f} | {low:.3f}-{high:.3f} |"
        )
        assert line in text
        points = " | ".join(f"{point['accuracy']['mean']:.3f}" for point in row["few_shot"])
        assert f"| {method} | {points} |" in text
    assert "| method | 0 | 4 |" in text
    for name in ("table.png", "few_shot.png"):
        assert f"]({name})" in text
        assert (out / name).read_bytes().startswith(b"\x89PNG\r\n")


def test_the_page_shows_intervals_and_warnings(out: Path) -> None:
    table = table_of(out)
    accuracy = table["methods"]["PAL"]["accuracy"]
    accuracy |= {"mean": 0.7, "ci95_over_seeds": [0.6254759, 0.7745241]}
    table["methods"]["BTL"]["warnings"] = [{"seeds": [0, 2], "text": "too good to be true"}]
    lines = page(table)
    assert any("| 0.700 (0.625-0.775) |" in line for line in lines)
    assert "Warning, BTL, seed 0, 2: too good to be true" in lines


def test_run_directories_are_ordinary(out: Path) -> None:
    for method, keys in METHODS.items():
        for seed in range(NUM_SEEDS):
            run = RunDirectory(out / "runs" / method / f"seed_{seed}")
            config = yaml.safe_load(run.config_file.read_text())
            assert config["train"]["seed"] == seed
            head = keys["head"]
            name = head if isinstance(head, str) else head["class_path"]
            assert config["head"]["class_path"].endswith(f".{name}")
            assert (run.status() or {})["state"] == "finished"


def test_a_killed_comparison_goes_on_to_the_same_table(
    warm: WarmParent, suite: Path, out: Path, tmp_path: Path
) -> None:
    """Two epochs make two checkpoints a run, so the fifth is inside the third run."""
    cut, log = tmp_path / "out", tmp_path / "log"
    kill = "tests.compare.cases:start_and_kill"
    assert warm(kill, suite, cut, log, "latest.json written", 5) == [KILLED]
    finished = [cut / "runs" / "BTL" / f"seed_{seed}" for seed in range(NUM_SEEDS)]
    before = {run: contents(run) for run in finished}
    assert all((run / "eval" / "test.json").is_file() for run in finished)
    third = RunDirectory(cut / "runs" / "PAL" / "seed_0")
    assert len(third.complete_steps()) == 1 and not (cut / "table.json").exists()
    first_save = third.checkpoint(third.complete_steps()[0]) / "manifest.json"
    written = first_save.stat().st_mtime_ns
    assert warm(START, suite, cut, log) == [0]
    assert {run: contents(run) for run in finished} == before
    assert first_save.stat().st_mtime_ns == written, "resumed, not begun anew"
    assert "2 of 4 runs are finished" in Path(f"{log}.0").read_text()
    for table in (whole := table_of(out), again := table_of(cut)):
        for row in table["methods"].values():
            row.pop("runs")
    assert again == whole
    # Once more: nothing is left to do.
    before_all = contents(cut / "runs")
    assert warm(START, suite, cut, log) == [0]
    assert contents(cut / "runs") == before_all


def test_two_ranks_one_method_at_a_time_and_a_stop(
    warm: WarmParent, suite: Path, out: Path, tmp_path: Path
) -> None:
    there, log = tmp_path / "out", tmp_path / "log"
    two_ranks = "tests.compare.cases:start_two_ranks"
    words = (suite, there, log, "--only=PAL")
    assert warm(two_ranks, *words, "--train.stop_after=3") == [75, 75]
    said = Path(f"{log}.0").read_text()
    assert "PAL, seed 0, stopped at update 3 (stop_after). The same command goes on" in said
    assert warm(two_ranks, *words) == [0, 0]
    table, whole = table_of(there), table_of(out)
    assert (
        table["not_finished"] == ["BTL"]
        and "Not finished: BTL." in (there / "table.md").read_text()
    )
    found, known = table["methods"]["PAL"], whole["methods"]["PAL"]
    # Ranks add in another order: equal but for rounding, which may turn a pair that is all but a tie. Adam makes up to
    # 1e-3 of it in these few updates; of 100 margins that spread over several units, 0.1 lie so near to 0. Two pairs.
    two_pairs = pytest.approx(known["accuracy"]["by_seed"], abs=2 / known["pairs"] + 1e-12)
    assert found["pairs"] == known["pairs"] > 80
    assert found["accuracy"]["by_seed"] == two_pairs
    for point, other in zip(found["few_shot"], known["few_shot"], strict=True):
        assert point["accuracy"]["mean"] == pytest.approx(other["accuracy"]["mean"], abs=0.02)


def test_methods_share_states_only_where_they_read_alike(warm: WarmParent, tmp_path: Path) -> None:
    """One after the other in one process they end as each alone; what is shared is not even looked up again."""
    suite = warm("tests.compare.cases:write_text_suite", tmp_path)
    assert warm(START, suite, tmp_path / "out", tmp_path / "log") == [0]
    together = table_of(tmp_path / "out")["methods"]
    for method in ("A", "B", "C"):
        alone = tmp_path / method
        words = (f"--only={method}", f"--backbone.cache={tmp_path / 'out' / 'cache'}")
        assert warm(START, suite, alone, tmp_path / "log_alone", *words) == [0]
        found = table_of(alone)["methods"][method]
        # Alone there is nothing to gain over.
        together[method].pop("gain")
        assert {**found, "runs": []} == {**together[method], "runs": []}
    said = (tmp_path / "log.0").read_text()
    of_methods = re.split(r"^(?:BTL|A|B|C), seed 0: ", said, flags=re.MULTILINE)[1:]
    # Training and evaluation ask the cache for each kind of states; A trains with those of BTL. At the end the
    # regressions from scratch ask once.
    assert [part.count(" texts are here, ") for part in of_methods] == [2, 1, 4, 4 + 1]


def test_a_run_with_other_values_is_refused_before_any_is_trained(
    warm: WarmParent, suite: Path, out: Path, tmp_path: Path
) -> None:
    before = contents(out)
    assert warm(START, suite, out, tmp_path / "log", "--optim.learning_rate=0.5") == [2]
    said = (tmp_path / "log.0").read_text()
    assert "config.yaml: this run was made with other values of optim.learning_rate." in said
    assert contents(out) == before
    # A table of what is there has nothing to say of a method that is another now.
    parser = build_parser()
    parsed = parser.parse_args(
        ["compare", f"--config={suite}", f"--out={out}", "--loss.kind=hinge"]
    )
    other = suite_of(parser.instantiate(parsed)["compare"], parsed["compare"])
    assert tabulate(other, {})["not_finished"] == list(METHODS)


def test_figures_of_adapted_users_are_not_those_of_the_run(out: Path, suite: Path) -> None:
    """Someone evaluated a suite's run with `--users`, under the name that the table reads."""
    parser = build_parser()
    parsed = parser.parse_args(["compare", f"--config={suite}", f"--out={out}"])
    own = suite_of(parser.instantiate(parsed)["compare"], parsed["compare"])
    assert tabulate(own, {})["not_finished"] == []
    method = next(iter(METHODS))
    file = out / "runs" / method / "seed_0" / "eval" / "test.json"
    text = file.read_text()
    assert json.loads(text)["adapted_users"] == 0
    try:
        file.write_text(json.dumps({**json.loads(text), "adapted_users": 3}))
        assert tabulate(own, {})["not_finished"] == [method]
    finally:
        file.write_text(text)


def test_nobody_held_out_is_refused_before_any_is_trained(
    warm: WarmParent, suite: Path, tmp_path: Path
) -> None:
    words = (f"--data.path={tmp_path / 'data'}", "--data.unseen_user_fraction=0")
    assert warm(START, suite, tmp_path / "out", tmp_path / "log", *words) == [2]
    assert (
        "its split unseen_train is empty, and suite tiny needs it"
        in (tmp_path / "log.0").read_text()
    )
    assert not (tmp_path / "out").exists()
