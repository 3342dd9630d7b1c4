"""What embed.sbatch makes of the end of its ranks, without a cluster."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.stand_ins import Job

RECIPE = "backbone:\n  path: base # of cache: no\n  cache: c\nhead: {cache: other}\n"
STOPPED = 75


def job_in(folder: Path, **facts: Any) -> Job:
    (folder / "c").mkdir(exist_ok=True)
    return Job(folder, status="", checkpoint="", **{"recipe": RECIPE, **facts})


def ends_of(job: Job, num_starts: int) -> list[tuple[int, bool]]:
    """Exit code of each start, and whether it was requeued."""
    ends = []
    for _ in range(num_starts):
        job.calls.unlink(missing_ok=True)
        ends.append((job.start(script="embed")[0], job.requeued()))
    return ends


def test_a_full_cache_ends_the_job(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    code, log = job.start("--backbone.cache=d", script="embed")
    assert code == 0 and not job.requeued() and "done" in log
    assert job.srun().endswith(
        "pal_ds.distributed.slurm embed --config=./recipe.yaml --backbone.cache=d"
    )


@pytest.mark.parametrize("code", [2, 4])
def test_what_a_person_must_mend_fails(tmp_path: Path, code: int) -> None:
    job = job_in(tmp_path, code=code)
    assert job.start(script="embed")[0] == code and not job.requeued()


@pytest.mark.parametrize("signal", [None, "USR2", "TERM"])
def test_stopped_before_the_end_it_is_never_done(tmp_path: Path, signal: str | None) -> None:
    """By a time limit of the recipe or SLURM's TERM to the ranks alone, or by what this script passes on."""
    job = job_in(tmp_path, code=STOPPED, seconds=20 if signal else 0)
    if signal is None:
        code, log = job.start(script="embed")
    else:
        code, log = job.signalled(signal, "srun", script="embed")
        assert job.calls.read_text().count("rank got USR2") == 1
    assert code == 0 and job.requeued() and "slurm: " in log and ": done" not in log, log
    assert "stopped before the end" in log and "go on from what the cache holds" in log
    assert not (tmp_path / "c" / "slurm" / "failures").exists()


def test_a_stop_that_came_too_late_is_none(tmp_path: Path) -> None:
    job = job_in(tmp_path, seconds=20)
    code, log = job.signalled("USR2", "srun", script="embed")
    assert code == 0 and not job.requeued() and ": done" in log, log


@pytest.mark.parametrize("why", [{"state": "PREEMPTED"}, {"state": "CANCELLED"}, {"restarts": 1}])
def test_slurm_is_not_helped_where_it_acts_itself(tmp_path: Path, why: dict[str, Any]) -> None:
    job = job_in(tmp_path, code=STOPPED, seconds=20, **why)
    code, log = job.signalled("TERM", "srun", script="embed")
    assert code == 0 and not job.requeued() and ": done" not in log
    assert why.get("state", "anew") in log


def test_a_preempted_job_waits_for_slurm(tmp_path: Path) -> None:
    job = job_in(tmp_path, code=STOPPED, preempted="2099-01-01T00:00:00")
    _, log = job.start(script="embed")
    assert "preempted; waiting for SLURM to requeue" in log and ": done" not in log


@pytest.mark.parametrize("why", [{"silent": "gone"}, {"refused": "yes"}])
def test_unfinished_and_not_requeued_it_does_not_end_with_0(
    tmp_path: Path, why: dict[str, str]
) -> None:
    job = job_in(tmp_path, code=STOPPED, **why)
    code, log = job.start(script="embed")
    assert code == 7 and "submit it again to go on from what the cache holds" in log


def test_a_lost_node_is_no_end(tmp_path: Path) -> None:
    """Of a node without slurmd srun may report 0 while its ranks are at work."""
    job = job_in(tmp_path, answer=1)
    code, log = job.start(script="embed")
    assert code == 0 and job.requeued() and "a node does not answer" in log and ": done" not in log


def test_the_third_failure_in_a_row_that_encoded_nothing_is_final(tmp_path: Path) -> None:
    job = job_in(tmp_path, code=5)
    job.variables["SLURM_RESTART_COUNT"], job.restarts = "9", 9  # preemptions are no failures
    assert ends_of(job, 3) == [(0, True), (0, True), (5, False)]
    (tmp_path / "c" / "new.safetensors").touch()
    assert ends_of(job, 1) == [(0, True)]


@pytest.mark.parametrize("why", [{"preempted": "2099-01-01T00:00:00"}, {"state": "PREEMPTED"}])
def test_ranks_that_a_preemption_kills_have_not_failed(tmp_path: Path, why: dict[str, str]) -> None:
    """SLURM's TERM may meet them before they listen to it, and this script is not told."""
    job = job_in(tmp_path, code=143, **why)
    assert [code for code, _ in ends_of(job, 4)] == [0] * 4
    assert not (tmp_path / "c" / "slurm" / "failures").exists()


def test_failures_that_encode_something_are_started_anew(tmp_path: Path) -> None:
    job = job_in(tmp_path, code=5, shards="c")
    assert ends_of(job, 5) == [(0, True)] * 5


def test_a_job_that_is_stopped_before_its_first_shard_is_given_up(tmp_path: Path) -> None:
    job = job_in(tmp_path, code=STOPPED)
    assert ends_of(job, 11) == [(0, True)] * 10 + [(7, False)]
    code, log = job.start(script="embed")
    assert code == 7 and "10 starts in a row saved nothing beyond what the cache holds" in log
    assert "--time" in log and "save_every" not in log
    rows = (tmp_path / "c" / "slurm" / "starts.jsonl").read_text().splitlines()
    assert len(rows) == 10 and json.loads(rows[0])["saved"] == "0"


def test_progress_at_every_start_is_never_given_up(tmp_path: Path) -> None:
    """A time limit of the recipe's own, say, that always falls into the work."""
    job = job_in(tmp_path, code=STOPPED, shards="c")
    assert ends_of(job, 12) == [(0, True)] * 12


@pytest.mark.parametrize("said", ["yaml", "json", "layer", "word", "two words"])
def test_the_starts_are_written_down_in_the_cache(tmp_path: Path, said: str) -> None:
    recipe = {"yaml": 'backbone: {path: b, cache: "my cache"}\n'}.get(said, RECIPE)
    if said == "json":
        recipe = json.dumps({"data": {"cache": 1}, "backbone": {"cache": "my cache", "path": "b"}})
    (tmp_path / "more.yaml").write_text("backbone:\n  cache: my cache\n")
    words = {
        "layer": ["--config=more.yaml"],
        "word": ["--backbone.cache=my cache"],
        "two words": ["--backbone.cache", "my cache"],
    }
    job = job_in(tmp_path, recipe=recipe)
    code, log = job.start(*words.get(said, []), script="embed")
    assert code == 0 and (tmp_path / "my cache" / "slurm" / "starts.jsonl").is_file(), log


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("backbone: {cache: null}\nhead: {}\n", "Name the folder that is to hold the states"),
        (RECIPE + "train: {stop_signals: [TERM]}\n", "tells the ranks to save by USR2"),
    ],
)
def test_what_cannot_go_on_is_refused(tmp_path: Path, recipe: str, message: str) -> None:
    job = job_in(tmp_path, recipe=recipe)
    code, log = job.start(script="embed")
    assert code == 2 and message in log and not job.calls.exists()
