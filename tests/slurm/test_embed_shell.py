"""What embed.sbatch makes of the end of its ranks, without a cluster."""

from pathlib import Path

import pytest

from tests.slurm.stand_ins import Job


def test_a_full_cache_ends_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path, status="", checkpoint="")
    code, log = job.start("--backbone.cache=c", script="embed")
    assert code == 0 and not job.requeued() and "done" in log
    assert job.srun().endswith("pal_ds.engine.slurm embed --config recipe.yaml --backbone.cache=c")


@pytest.mark.parametrize("code", [2, 4])
def test_what_a_person_must_mend_fails(tmp_path: Path, code: int) -> None:
    job = Job(tmp_path, code=code, status="", checkpoint="")
    assert job.start(script="embed")[0] == code and not job.requeued()


def test_a_lost_rank_is_started_anew_but_not_for_ever(tmp_path: Path) -> None:
    job = Job(tmp_path, code=5, status="", checkpoint="")
    code, log = job.start(script="embed")
    assert code == 0 and job.requeued() and "go on from what the cache holds" in log
    job.calls.unlink()
    job.variables["SLURM_RESTART_COUNT"] = "10"
    job.restarts = 10
    code, log = job.start(script="embed")
    assert code == 5 and not job.requeued() and "gave up" in log


def test_asked_to_stop_it_goes_on_later(tmp_path: Path) -> None:
    job = Job(tmp_path, seconds=20, status="", checkpoint="")
    code, log = job.signalled("USR2", "srun", script="embed")
    assert code == 0 and job.requeued() and job.calls.read_text().count("rank got USR2") == 1, log


def test_a_cancelled_job_is_left_alone(tmp_path: Path) -> None:
    job = Job(tmp_path, seconds=20, status="", checkpoint="", state="CANCELLED")
    code, log = job.signalled("TERM", "srun", script="embed")
    assert code == 0 and not job.requeued() and "CANCELLED" in log
