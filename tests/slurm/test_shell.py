"""What the batch scripts decide, without a cluster: srun, scontrol and python are stand-ins."""

import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.spawn import ROOT

SRUN = """#!/bin/bash
case "$*" in *" true") exit {answer} ;; esac
echo "srun $*" >>"$CALLS"
printf '%s' "$MASTER_PORT" >"$CALLS.port"
[ -z '{silent}' ] || : >"$CALLS.silent"
[ -z '{status}' ] || printf '%s\\n' '{status}' >"$RUN/status.json"
[ -z '{checkpoint}' ] || printf '{{"step": %s}}\\n' '{checkpoint}' >"$RUN/latest.json"
trap 'echo "rank got USR2" >>"$CALLS"; exit {code}' USR2
[ {seconds} = 0 ] || {{ /bin/sleep {seconds} >/dev/null 2>&1 & wait $!; }}
exit {code}
"""
SCONTROL = """#!/bin/bash
case "$1" in
  # As a controller that is being restarted: silent where someone has said so, once.
  show) rm "$CALLS.silent" 2>/dev/null && exit 1
        echo "   JobState={state} Restarts={restarts} PreemptTime={preempted} EndTime={end}"
        echo "   Command={root}/slurm/train.sbatch x" ;;
  requeue) echo "requeue $2" >>"$CALLS" ;;
esac
"""
# Waiting for SLURM to end the job would take minutes.
SLEEP = '#!/bin/bash\n[ "$1" -lt 10 ] || exit 0\nexec /bin/sleep "$1"\n'


@dataclass
class Job:
    """One start of train.sbatch with stand-ins for all that is not bash."""

    folder: Path
    code: int = 0
    status: str = '{"state": "finished", "reason": null}'
    checkpoint: str = "40"
    seconds: float = 0
    answer: int = 0
    state: str = "RUNNING"
    restarts: int = 0
    preempted: str = "None"
    end: str = "Unknown"
    silent: str = ""
    variables: dict[str, str] = field(default_factory=dict)

    def begin(self, *words: str, script: str = "train") -> "subprocess.Popen[str]":
        bin_ = self.folder / "bin"
        bin_.mkdir(parents=True, exist_ok=True)
        scripts = {"srun": SRUN, "scontrol": SCONTROL}
        for name, text in scripts.items():
            (bin_ / name).write_text(text.format(**vars(self), root=ROOT))
        (bin_ / "sleep").write_text(SLEEP)
        (bin_ / "python").write_text('#!/bin/bash\necho "python $*" >>"$CALLS"\n')
        for path in bin_.iterdir():
            path.chmod(0o755)
        (self.folder / "recipe.yaml").write_text("train: {}\n")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "OMP"))}
        job = {
            "SLURM_JOB_ID": "7",
            "SLURM_NTASKS": "2",
            "SLURM_NNODES": "2",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_CPUS_PER_TASK": "3",
            "SLURM_SUBMIT_DIR": str(self.folder),
        }
        own = {"CALLS": str(self.calls), "RUN": str(self.run), "PATH": f"{bin_}:{kept['PATH']}"}
        return subprocess.Popen(
            ["bash", str(ROOT / "slurm" / f"{script}.sbatch"), "recipe.yaml", *words],
            env=kept | job | own | self.variables,
            cwd=self.folder,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def start(self, *words: str, script: str = "train") -> tuple[int, str]:
        """Exit code and log of a start that nobody disturbs."""
        process = self.begin(*words, script=script)
        log = process.communicate(timeout=30)[0]
        return process.returncode, log

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "recipe"

    @property
    def calls(self) -> Path:
        return self.folder / "calls"

    def requeued(self) -> bool:
        return self.calls.is_file() and "requeue 7" in self.calls.read_text()

    def srun(self) -> str:
        return next(line for line in self.calls.read_text().splitlines() if line[:4] == "srun")


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
    assert (record / "code" / "pal_ds" / "cli.py").is_file()
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


@pytest.mark.parametrize("facts", [{"state": "COMPLETING"}, {"restarts": 1}])
def test_slurm_is_not_helped_where_it_acts_itself(tmp_path: Path, facts: dict) -> None:
    """It is ending the job, or has started it elsewhere while this node was lost to it."""
    job = Job(tmp_path, status=STOPPED % "signal", **facts)
    code, log = job.start()
    assert code == 0 and not job.requeued(), log


def test_a_controller_that_is_away_is_asked_again(tmp_path: Path) -> None:
    job = Job(tmp_path, status=STOPPED % "signal", silent="yes")
    code, log = job.start()
    assert code == 0 and job.requeued() and "does not answer; asking again" in log


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


@pytest.mark.parametrize("code", [5, 134, 137])
def test_lost_ranks_are_started_again_a_few_times(tmp_path: Path, code: int) -> None:
    job = Job(tmp_path, code=code, status="", checkpoint="40")
    ends = []
    for _ in range(3):
        job.calls.unlink(missing_ok=True)
        ends.append((job.start()[0], job.requeued()))
    assert ends == [(0, True), (0, True), (code, False)]
    # Progress starts the count anew.
    job.checkpoint = "60"
    assert job.start()[0] == 0 and job.requeued()


def test_a_limit_too_short_for_one_update_does_not_go_on_for_ever(tmp_path: Path) -> None:
    job = Job(tmp_path, status=STOPPED % "time limit")
    job.start()
    ends = [job.start()[0] for _ in range(3)]
    assert ends == [0, 0, 1]


@pytest.mark.parametrize("signal", ["USR2", "TERM"])
def test_a_signal_reaches_the_ranks_once(tmp_path: Path, signal: str) -> None:
    job = Job(tmp_path, status=STOPPED % "signal", seconds=20)
    process = job.begin()
    for _ in range(200):
        if job.calls.is_file():
            break
        subprocess.run(["/bin/sleep", "0.05"])
    subprocess.run(["/bin/sleep", "0.2"])
    for _ in range(3):
        subprocess.run(["kill", f"-{signal}", str(process.pid)])
    log = process.communicate(timeout=30)[0]
    assert process.returncode == 0 and job.requeued(), log
    assert job.calls.read_text().count("rank got USR2") == 1


def test_ranks_that_die_of_the_signal_while_starting_are_no_failure(tmp_path: Path) -> None:
    job = Job(tmp_path, code=140, status="", seconds=20)
    process = job.begin()
    while not job.calls.is_file():
        subprocess.run(["/bin/sleep", "0.05"])
    subprocess.run(["/bin/sleep", "0.2"])
    subprocess.run(["kill", "-USR2", str(process.pid)])
    process.communicate(timeout=30)
    assert job.requeued() and not (job.run / "slurm" / "failures").exists()


def test_the_step_gets_what_slurm_does_not_pass_on(tmp_path: Path) -> None:
    job = Job(tmp_path, end="2099-01-01T00:00:00")
    _, log = job.start("--train.epochs", "3", "--run_dir", "runs/recipe")
    words = job.srun()
    assert "--cpus-per-task=3" in words and "--kill-on-bad-exit=0" in words
    assert "--train.time_limit_minutes=" in words and words.endswith("--train.epochs 3"), log
    assert 20000 <= int(Path(f"{job.calls}.port").read_text()) < 32000


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
        env={**os.environ, "SLURM_JOB_ID": "7", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        cwd=tmp_path,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2 and "recipe.yaml: no such recipe" in done.stderr


def test_a_sweep_over_seeds_and_over_recipes(tmp_path: Path) -> None:
    """The task's number is the seed of a single recipe, and the place of one among several."""
    (tmp_path / "other.yaml").write_text("train: {seed: 5}\n")
    array = {"SLURM_ARRAY_JOB_ID": "6", "SLURM_ARRAY_TASK_ID": "1"}
    job = Job(tmp_path, variables=array)
    _, log = job.start("--train.epochs=3", script="sweep")
    assert "--run_dir runs/recipe/seed_1 " in job.srun(), log
    assert job.srun().endswith("--train.epochs=3 --train.seed=1")
    prepared, trained = job.calls.read_text().splitlines()[:2]
    assert (
        prepared.startswith("python -P -m pal_ds prepare --config recipe.yaml")
        and trained == job.srun()
    )
    job.calls.unlink()
    job.start("other.yaml", "--run_dir=here", script="sweep")
    assert "--run_dir here/other" in job.srun() and "seed" not in job.srun()
    assert (tmp_path / "here" / "other" / "slurm" / "6_1" / "recipe.yaml").is_file()
    code, log = Job(tmp_path, variables={**array, "SLURM_ARRAY_TASK_ID": "2"}).start(
        "other.yaml", script="sweep"
    )
    assert code == 2 and "only 2 recipes are given" in log
