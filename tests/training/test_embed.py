"""`embed` and trainings from its cache: to the bit as in memory, whoever fills it and however often it is killed."""

from pathlib import Path
from typing import Any

import pytest

from pal_ds.cli.main import main
from tests.warm import KILLED, WarmParent

CASES = "tests.feature_cache.cache_cases:"


@pytest.fixture(scope="module")
def place(warm: WarmParent, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("embed") / "place")
    warm(f"{CASES}make_place", folder)
    return folder


@pytest.fixture(scope="module")
def runs(warm: WarmParent, place: str) -> dict[str, Any]:
    return warm(f"{CASES}train_from_memory_and_cache", place)


def test_a_run_from_the_cache_is_the_run_in_memory(runs: dict[str, Any]) -> None:
    """To the bit: weights, users with their moments, figures; `embed` encoded other texts beside those of the run."""
    assert runs["num_tensors"] >= 40
    for name in ("memory", "embed", "cached", "filling", "again"):
        assert runs[name]["codes"] == [0] * len(runs[name]["codes"]), runs[name]["said"]
    assert runs["embed"]["read"][0] > runs["filling"]["read"][0] > 20


def test_what_is_cached_needs_no_weights(runs: dict[str, Any]) -> None:
    assert "update: load weights" in runs["memory"]["phases"]
    assert "update: load weights" in runs["filling"]["phases"]
    assert runs["filling"]["to_encode"] == runs["filling"]["read"]
    for name in ("cached", "again"):
        assert runs[name]["to_encode"] == [0, 0]
        assert "update: load weights" not in runs[name]["phases"]


def test_evaluate_reads_the_cache(warm: WarmParent, place: str, runs: dict[str, Any]) -> None:
    found = warm(f"{CASES}evaluate_without_weights", place)
    assert found["equal"] and found["pairs"] > 0


def test_killed_at_any_moment_it_goes_on(
    warm: WarmParent, place: str, runs: dict[str, Any]
) -> None:
    """What shards hold is never encoded again, by another number of ranks either; all ends as undisturbed."""
    told = warm(f"{CASES}killed", place, 0)
    *cut, end = told["starts"]
    for start in cut:
        assert KILLED in start["codes"], start["said"]
    assert end["codes"] == [0, 0], end["said"]
    num_texts = end["read"][0]
    held = [[0, 0], *(start["held"] for start in cut)]
    for before, start in zip(held, told["starts"], strict=True):
        prompts, responses = before
        assert start["to_encode"] == [num_texts - responses, num_texts - prompts]
    assert 0 < held[1][1] < held[2][1] < num_texts
    assert told["num_states"] == 2 * num_texts


def test_full_disk_and_stop(warm: WarmParent, place: str, runs: dict[str, Any]) -> None:
    told = warm(f"{CASES}refused_and_stopped", place)
    full, stopped, end = told["full"], told["stopped"], told["end"]
    assert full["codes"] == [4, 4]
    lines = [line for part in full["said"] for line in part.splitlines() if "error: " in line]
    assert len(lines) == 1 and "rank 1: " in lines[0] and "File too large" in lines[0], full["said"]
    assert f"{place}/full" in lines[0] and "Traceback" not in "".join(full["said"])
    assert stopped["codes"] == [75, 75] and "stopping (signal)" in stopped["said"][0]
    lines = [line for part in stopped["said"] for line in part.splitlines() if "pal-ds: " in line]
    assert len(lines) == 1 and "error" not in lines[0], stopped["said"]
    assert f"{place}/full: stopped before every text was encoded" in lines[0]
    # Three rounds of four texts on two ranks were made before the fourth; they were in no full shard.
    num_made = sum(stopped["held"]) - sum(full["held"])
    assert 0 < num_made <= 2 * 3 * 2 * 4
    num_texts = end["read"][0]
    assert end["to_encode"] == [num_texts - held for held in reversed(stopped["held"])]
    assert end["codes"] == [0] and told["num_states"] == 2 * num_texts


@pytest.mark.parametrize("name", ["cached", "in_memory"])
def test_a_training_stopped_while_it_encodes_goes_on(
    warm: WarmParent, place: str, runs: dict[str, Any], name: str
) -> None:
    """It ends as any stopped run; started again it is the run that was never stopped, and its shards are read."""
    told = warm(f"{CASES}stopped_in_start", place, name == "cached")
    stopped, end = told["stopped"], told["end"]
    assert stopped["codes"] == [0, 0], stopped["said"]
    assert "(signal)" in stopped["said"][0] and "Traceback" not in "".join(stopped["said"])
    assert told["status"] == {
        "state": "stopped",
        "step": 0,
        "num_updates": told["finished"]["num_updates"],
        "reason": "signal",
    }
    assert end["codes"] == [0, 0] and told["finished"]["state"] == "finished", end["said"]
    assert told["num_tensors"] >= 20
    # Three rounds of four texts on two ranks came before the stop in the fourth.
    read = stopped["read"]
    assert end["to_encode"] == ([read[0] - told["held"], read[1] - told["held"]] if read else [])
    assert told["held"] == (24 if name == "cached" else 0)


@pytest.mark.parametrize("cached", [True, False])
def test_a_time_limit_may_fall_into_the_encoding(
    warm: WarmParent, place: str, runs: dict[str, Any], cached: bool
) -> None:
    told = warm(f"{CASES}out_of_time_in_start", place, cached)
    assert told["codes"] == [0, 0], told["said"]
    assert (told["status"]["state"], told["status"]["reason"]) == ("stopped", "time limit")


def test_two_at_once(warm: WarmParent, place: str, runs: dict[str, Any]) -> None:
    told = warm(f"{CASES}two_at_once", place)
    assert told["codes"] == [0, 0] and told["left"] == [["cache.json"]] * 2
    assert told["num_states"] == 2 * runs["embed"]["read"][0]


def test_vectors_are_refused(warm: WarmParent, tmp_path: Path) -> None:
    told = warm(f"{CASES}refuse_vectors", tmp_path)
    assert told["codes"] == [2]
    assert "there is nothing to embed" in told["said"][0] and "Traceback" not in told["said"][0]


REFUSALS = {
    "no cache": ([], "backbone.cache: not set"),
    "trained": (["--backbone.cache=c", "--backbone.tuning=lora"], "backbone.tuning: lora; only"),
    "random weights": (
        ["--backbone.cache=c", "--backbone.path=null", "--backbone.architecture={}"],
        "Give backbone.path",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(
    place: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    words, message = REFUSALS[case]
    with pytest.raises(SystemExit) as end:
        main(["embed", f"--config={place}/recipe.yaml", *words])
    assert end.value.code == 2 and message in capsys.readouterr().err
