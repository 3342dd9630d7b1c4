"""What the batch scripts decide, without a cluster."""

import datetime
import json
import os
import subprocess
from pathlib import Path

import pytest

from pal_ds.errors import UserError
from tests.slurm.stand_ins import Job
from tests.spawn import ROOT

STOPPED = '{"state": "stopped", "reason": "%s"}'


def test_a_finished_run_ends_the_job(tmp_path: Path) -> None:
    job = Job(tmp_path)
    code, log = job.start()
    assert code == 0 and not job.requeued(), log
    assert "finished, at update 40" in log
    # SLURM may start it once more all the same.
    job.calls.unlink()
    code, log = job.start()
    assert code == 0 and not job.calls.exists() and "finished by an earlier start" in log
    record = job.run / "slurm" / "7"
    assert (record / "recipe.yaml").read_text() == "train: {}\n"
    assert (record / "code" / "pal_ds" / "cli" / "main.py").is_file()
    assert not list((record / "code").rglob("__pycache__"))


@pytest.mark.parametrize(
    ("reason", "again"), [("signal", True), ("time limit", True), ("stop_after", False)]
)
def test_a_stopped_run_is_requeued_unless_it_asked_to_stop(
    tmp_path: Path, reason: str, again: bool
) -> None:
    job = Job(tmp_path, status=STOPPED % reason)
    code, log = job.start()
    assert code == 0 and job.requeued() == again, log


def test_a_signal_on_its_way_is_no_end(tmp_path: Path) -> None:
    """What SLURM says of a running job then; to leave would end it unfinished."""
    job = Job(tmp_path, status=STOPPED % "signal", state="SIGNALING")
    assert job.start()[0] == 0 and job.requeued()


@pytest.mark.parametrize("facts", [{"state": "COMPLETING"}, {"restarts": 1}])
def test_slurm_is_not_helped_where_it_acts_itself(tmp_path: Path, facts: dict) -> None:
    """It is ending the job, or has started it elsewhere while this node was lost to it."""
    job = Job(tmp_path, status=STOPPED % "signal", **facts)
    code, log = job.start()
    assert code == 0 and not job.requeued(), log


def test_a_controller_that_is_away_is_asked_again(tmp_path: Path) -> None:
    job = Job(tmp_path, status=STOPPED % "signal", silent="silent")
    code, log = job.start()
    assert code == 0 and job.requeued() and "does not answer; asking again" in log


@pytest.mark.parametrize("why", [{"silent": "gone"}, {"refused": "yes"}])
@pytest.mark.parametrize("ranks", [0, 5])
def test_an_unfinished_job_that_is_not_requeued_does_not_end_with_0(
    tmp_path: Path, why: dict, ranks: int
) -> None:
    """A site without scontrol or with --no-requeue: what waits for this job (afterok) must not begin."""
    job = Job(tmp_path, code=ranks, status=STOPPED % "signal", **why)
    code, log = job.start()
    assert code == (ranks or 7) and not job.requeued(), log
    assert "submit it again to go on from update 40" in log and "anew" not in log


def test_a_zombie_finds_out_that_the_job_was_started_elsewhere(tmp_path: Path) -> None:
    job = Job(tmp_path, status=STOPPED % "signal", seconds=20, restarts=1)
    code, log = job.start()
    assert code == 0 and not job.requeued() and "rank got USR2" in job.calls.read_text()
    assert log.count("SLURM has started this job anew") == 2, log


@pytest.mark.parametrize("restarts", [0, 1])
def test_a_rank_that_srun_has_left_behind_is_asked_to_save(tmp_path: Path, restarts: int) -> None:
    """Of a node without slurmd srun reports a failure, with 0, while the rank trains on."""
    rank = tmp_path / "rank"
    rank.write_text(
        """trap 'echo "{\\"state\\": \\"stopped\\", \\"reason\\": \\"signal\\"}" >"$RUN/status.json"; exit' USR2
echo "{\\"host\\": \\"n1\\", \\"pid\\": $$}" >"$RUN/lock"
for _ in $(seq 200); do /bin/sleep 0.1; done"""
    )
    status = '{"state": "running"}'
    job = Job(tmp_path, status=status, leftover=f"bash {rank}", restarts=restarts)
    code, log = job.start()
    assert code == 0 and job.requeued() == (restarts == 0), log
    assert "asking it to save and stop" in log and "stopped, signal, at update 40" in log
    assert not (job.run / "slurm" / "failures").exists()


def test_a_lock_of_another_is_no_rank_of_ours(tmp_path: Path) -> None:
    job = Job(tmp_path, code=5)
    job.run.mkdir(parents=True)
    (job.run / "lock").write_text(json.dumps({"host": "n1", "pid": os.getpid()}))
    code, log = job.start()
    assert code == 0 and job.requeued() and "behind" not in log


def test_a_site_without_scontrol_is_left_alone(tmp_path: Path) -> None:
    job = Job(tmp_path, seconds=1.5, variables={"SLURM_SUBMIT_DIR": str(ROOT)})
    (tmp_path / "calls.gone").touch()
    code, log = job.start()
    assert code == 0 and "rank got USR2" not in job.calls.read_text(), log


def test_a_second_job_in_a_run_directory_is_refused(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.start()
    starts = job.run / "slurm" / "starts.jsonl"
    starts.write_text(starts.read_text().replace('"job": "7"', '"job": "3"'))
    squeue = tmp_path / "bin" / "squeue"
    squeue.write_text('#!/bin/bash\n[ "$5" = 3 ] && echo "3 test pal-train R"\n')
    code, log = job.start()
    assert code == 2 and "job 3 is training there" in log
    squeue.write_text("#!/bin/bash\n")
    assert job.start()[0] == 0


@pytest.mark.parametrize("code", [1, 2, 3, 4])
def test_failures_that_would_come_again_are_final(tmp_path: Path, code: int) -> None:
    job = Job(tmp_path, code=code)
    found, log = job.start()
    assert found == code and not job.requeued() and f"exit code {code}" in log


def test_a_step_that_could_not_be_launched_is_tried_again(tmp_path: Path) -> None:
    job = Job(tmp_path, code=1, answer=1)
    _, log = job.start()
    assert job.requeued() and "a node does not answer" in log


@pytest.mark.parametrize("code", [5, 6, 134, 137])
def test_lost_ranks_are_started_again_a_few_times(tmp_path: Path, code: int) -> None:
    job = Job(tmp_path, code=code, status="", checkpoint="40")
    ends = []
    for _ in range(3):
        job.calls.unlink(missing_ok=True)
        ends.append((job.start()[0], job.requeued()))
    assert ends == [(0, True), (0, True), (code, False)]
    # So do another job, and progress.
    job.variables = {"SLURM_JOB_ID": "8"}
    assert job.start()[0] == 0
    job.variables = {}
    job.checkpoint = "60"
    assert job.start()[0] == 0 and job.requeued()


def test_a_job_that_never_saves_is_given_up(tmp_path: Path) -> None:
    """Preempted or at its limit before there is a checkpoint, over and over: no start of it is a failure."""
    job = Job(tmp_path, status=STOPPED % "signal", checkpoint="")
    ends = [job.start()[0] for _ in range(11)]
    code, log = job.start()
    assert ends == [0] * 10 + [7] and code == 7
    assert "10 starts in a row saved nothing beyond update 0" in log and "train.save_every" in log
    assert Job(tmp_path, variables={"SLURM_JOB_ID": "8"}).start()[0] == 0


def test_a_limit_too_short_for_one_update_does_not_go_on_for_ever(tmp_path: Path) -> None:
    job = Job(tmp_path, status=STOPPED % "time limit")
    job.start()
    ends = [job.start()[0] for _ in range(3)]
    assert ends == [0, 0, 7]


@pytest.mark.parametrize(("reason", "given_up"), [("time limit", 3), ("signal", 11)])
def test_texts_that_were_encoded_are_progress(tmp_path: Path, reason: str, given_up: int) -> None:
    """Stopped over and over while it fills a cache: each start goes on where the one before was stopped."""
    (tmp_path / "c").mkdir()
    facts = {"status": STOPPED % reason, "checkpoint": "", "recipe": "backbone: {cache: c}\n"}
    job = Job(tmp_path, shards="c", **facts)
    assert [job.start()[0] for _ in range(given_up + 1)] == [0] * (given_up + 1)
    rows = (job.run / "slurm" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(row)["saved"] for row in rows[:3]] == ["0+0", "0+1", "0+2"]
    # Another job, which encodes nothing.
    job.shards, job.variables = "", {"SLURM_JOB_ID": "8"}
    assert [job.start()[0] for _ in range(given_up)] == [0] * (given_up - 1) + [7]


@pytest.mark.parametrize("signal", ["USR2", "TERM"])
def test_a_signal_reaches_the_ranks_once(tmp_path: Path, signal: str) -> None:
    job = Job(tmp_path, status=STOPPED % "signal", seconds=20)
    code, log = job.signalled(signal, "srun")
    assert code == 0 and job.requeued(), log
    assert job.calls.read_text().count("rank got USR2") == 1


def test_ranks_that_die_of_the_signal_while_starting_are_no_failure(tmp_path: Path) -> None:
    job = Job(tmp_path, code=140, status="", seconds=20)
    job.signalled("USR2", "srun")
    assert job.requeued() and not (job.run / "slurm" / "failures").exists()


def test_the_step_gets_what_slurm_does_not_pass_on(tmp_path: Path) -> None:
    job = Job(tmp_path, end="2099-01-01T00:00:00")
    _, log = job.start("--train.epochs", "3", "--run_dir", "runs/recipe")
    words = job.srun()
    assert "--cpus-per-task=3" in words and "--kill-on-bad-exit=0" in words
    minutes = float(words.partition("--train.time_limit_minutes=")[2].split()[0])
    left = datetime.datetime(2099, 1, 1) - datetime.datetime.now()
    # Three minutes for containers to start before the run's clock does, and for the end.
    assert abs(left.total_seconds() / 60 - 3 - minutes) < 1
    assert words.endswith("--train.epochs 3"), log
    assert 20000 <= int(Path(f"{job.calls}.port").read_text()) < 32000


def test_recipes_are_those_of_the_first_start(tmp_path: Path) -> None:
    job = Job(tmp_path, code=5, recipe='{"train": {"ds_config": "my own.json", "epochs": 1}}\n')
    (tmp_path / "more.yaml").write_text("train:\n  epochs: 2 # of stop_signals: [TERM]\n")
    (tmp_path / "my own.json").write_text("{}")
    job.start("--config", "more.yaml", "--fresh")
    record = job.run / "slurm" / "7"
    (tmp_path / "more.yaml").write_text("train: {epochs: 3}\n")
    code, log = job.start("--config", "more.yaml", "--fresh")
    assert code == 0 and "--config=./runs/recipe/slurm/7/recipe_2.yaml" in job.srun(), log
    assert "epochs: 2" in (record / "recipe_2.yaml").read_text()
    # The run knows its DeepSpeed JSON by its path.
    (tmp_path / "my own.json").write_text('{"bf16": {}}')
    code, log = job.start("--config", "more.yaml", "--fresh")
    assert code == 2 and "my own.json: not what it was when this job first started" in log


def test_fresh_is_for_the_first_start(tmp_path: Path) -> None:
    """The directory of the log and of the record is there by then, and later starts find what the first has made."""
    job = Job(tmp_path, status=STOPPED % "signal")
    (job.run / "slurm").mkdir(parents=True)
    assert [job.start("--fresh")[0] for _ in range(2)] == [0, 0] and "--fresh" not in job.srun()
    job.variables = {"SLURM_JOB_ID": "8"}
    code, log = job.start("--fresh")
    assert code == 2 and "--fresh needs an empty directory" in log


def test_training_itself_starts_fresh_beside_the_record_of_a_job(tmp_path: Path) -> None:
    from pal_ds.runs.run_dir import RunDirectory
    from pal_ds.training.launch import TrainingRequest, check_run_directory

    (tmp_path / "slurm").mkdir()
    run = RunDirectory(tmp_path)
    request = TrainingRequest(config=None, recipe="", run=run, ds_config={}, fresh=True)
    check_run_directory(request, None)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="--fresh needs an empty directory"):
        check_run_directory(request, None)


@pytest.mark.parametrize("said", ["recipe", "block", "word"])
def test_ranks_that_would_die_of_usr2_are_refused(tmp_path: Path, said: str) -> None:
    texts = {
        "recipe": "train: {stop_signals: [TERM]}\n",
        "block": "train:\n  stop_signals:\n  - TERM\n  epochs: 1 # USR2\n",
    }
    job = Job(tmp_path, recipe=texts.get(said, "train: {}\n"))
    code, log = job.start(*(["--train.stop_signals=[TERM]"] if said == "word" else []))
    assert code == 2 and "tells the ranks to save by USR2" in log
    assert job.start("--train.stop_signals", "[USR2, TERM]")[0] == 0


def test_without_a_limit_none_is_passed(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.start()
    assert "time_limit" not in job.srun()


def test_updates_to_make_again_are_on_record(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.run.mkdir(parents=True)
    (job.run / "latest.json").write_text('{"step": 25}\n')
    (job.run / "metrics.jsonl").write_text(
        '{"step": 30, "loss": 1}\n{"step": 31, "loss": 1}\n{"step": 3'
    )
    job.start()
    row = json.loads((job.run / "slurm" / "starts.jsonl").read_text())
    assert (row["logged_step"], row["checkpoint_step"], row["tasks"]) == (31, 25, 2)


def test_nothing_of_the_environment_is_written(tmp_path: Path) -> None:
    job = Job(tmp_path, variables={"WANDB_API_KEY": "secret-of-the-test"})
    _, log = job.start()
    found = subprocess.run(
        ["grep", "-rF", "secret-of-the-test", str(tmp_path)], capture_output=True
    )
    assert found.returncode == 1 and "secret-of-the-test" not in log


def test_a_recipe_that_is_missing_is_named(tmp_path: Path) -> None:
    job = Job(tmp_path)
    process = job.begin()
    process.communicate(timeout=30)
    (tmp_path / "recipe.yaml").unlink()
    done = subprocess.run(
        ["bash", str(ROOT / "slurm" / "train.sbatch"), "recipe.yaml"],
        env={**os.environ, "SLURM_JOB_ID": "8", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2 and "recipe.yaml: no such recipe" in done.stderr


def test_a_signal_while_data_are_prepared_is_no_end(tmp_path: Path) -> None:
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "1"}
    job = Job(tmp_path, variables=array, prepare_seconds=20)
    code, log = job.signalled("USR2", "prepare", script="sweep")
    assert code == 0 and job.requeued() and "distributed.slurm" not in job.calls.read_text(), log


def test_a_sweep_over_seeds_and_over_recipes(tmp_path: Path) -> None:
    """The task's number is the seed of a single recipe, and the place of one among several."""
    (tmp_path / "other.yaml").write_text("train: {seed: 5}\n")
    array = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1"}
    job = Job(tmp_path, variables=array)
    _, log = job.start("--trust_checkpoint", "--train.epochs=3", script="sweep")
    prepared, trained = job.calls.read_text().splitlines()[:2]
    assert "--run_dir=./runs/recipe/seed_1 " in trained, log
    assert trained.endswith("--train.epochs=3 --train.seed=1")
    # From the snapshot, where the ranks run, and without what only `train` knows.
    assert (
        "--ntasks=1" in prepared
        and "--config=./runs/recipe/seed_1/slurm/6_1/recipe.yaml" in prepared
    )
    assert "--train.epochs=3" in prepared and "trust" not in prepared and "--trust" in trained
    job.calls.unlink()
    job.start("other.yaml", "--run_dir=here", script="sweep")
    trained = job.calls.read_text().splitlines()[1]
    assert "--run_dir=./here/other" in trained and "seed" not in trained
    assert (tmp_path / "here" / "other" / "slurm" / "6_1" / "recipe.yaml").is_file()
    code, log = Job(tmp_path, variables={**array, "SLURM_ARRAY_TASK_ID": "2"}).start(
        "other.yaml", script="sweep"
    )
    assert code == 2 and "only 2 recipes are given" in log
