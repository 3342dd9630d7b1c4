"""Ranks that are killed: at every stage of a save, at random moments, while a model is exported."""

from pathlib import Path

from tests.engine.kills import MOMENTS, NUM_RANKS
from tests.warm import KILLED, WarmParent


def test_killed_at_every_stage_of_a_save(warm: WarmParent, harness_folder: Path) -> None:
    """What is published stays intact after each kill, and the run ends where an undisturbed one ends."""
    *kills, end = warm("tests.engine.kills:kill_at_every_stage", harness_folder)
    assert [(kill["rank"], kill["moment"]) for kill in kills] == [
        (rank, moment) for rank in range(NUM_RANKS) for moment in MOMENTS[rank]
    ]
    assert end["left"] == []
    # Weights, moments, step counts, user rows and figures of every checkpoint that was kept.
    assert end["num_values"] > 200


def test_a_finished_run_deletes_what_a_killed_start_left(
    warm: WarmParent, harness_folder: Path
) -> None:
    assert warm("tests.engine.kills:kill_before_the_last_deletion", harness_folder) > 100


def test_killed_at_random_moments(warm: WarmParent, harness_folder: Path) -> None:
    """tools/bench/bench_kill.py does a hundred of these."""
    found = warm("tests.engine.kills:kill_at_random", harness_folder, 8, 2, 0)
    assert found["lost"] == []
    assert (found["training_kills"], found["export_kills"]) == (8, 2)
    assert set(found["exports"]) <= {"no folder", "a whole folder"}
    # A rank that lost the other says so by its exit status; only one that had not met it yet must be stopped.
    assert set(found["survivors"]) <= {"exit 5", "exit -9"}


def test_an_export_is_there_whole_or_not_at_all(warm: WarmParent, harness_folder: Path) -> None:
    before, after = warm("tests.engine.kills:kill_exports_at_their_end", harness_folder)
    assert (before["existed"], before["codes"]) == (False, [KILLED, 0])
    assert (after["existed"], after["codes"]) == (True, [KILLED])
    assert before["left"] == after["left"] == ["out"]
    assert before["files"] == after["files"]
    assert {"config.json", "model.safetensors"} < set(before["files"])
