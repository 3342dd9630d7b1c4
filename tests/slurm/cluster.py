"""The test cluster as the tests use it: jobs in a folder, waits with a reason, and the events that disturb jobs."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.spawn import ROOT, environment

SCRIPT = Path(__file__).with_name("cluster.sh")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "unshare", "nsenter")
SECRET = "a-key-that-must-not-be-written-anywhere"


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    missing = [name for name in COMMANDS if shutil.which(name, path=path_with_sbin()) is None]
    if missing:
        return (
            f"needs {', '.join(missing)}: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge "
            "iproute2"
        )
    if os.geteuid() != 0:
        return "needs root, for the namespaces that stand for nodes"
    probe = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True
    )
    return f"namespaces are not allowed here: {probe.stderr.strip()}" if probe.returncode else None


def path_with_sbin() -> str:
    own = Path(sys.executable).parent
    return os.pathsep.join([str(own), os.environ["PATH"], "/usr/sbin", "/sbin"])


@dataclass(frozen=True)
class Cluster:
    """A running cluster; jobs are submitted from, and write into, `folder`."""

    folder: Path
    environment: dict[str, str]

    def control(self, *words: str) -> None:
        """A command of cluster.sh."""
        # To a file: nodes inherit what it writes to, and a pipe would stay open as long as they live.
        log = self.folder / "cluster.log"
        with open(log, "a") as stream:
            done = subprocess.run(
                [str(SCRIPT), *words],
                env=self.environment,
                cwd=ROOT,
                stdout=stream,
                stderr=stream,
            )
        assert done.returncode == 0, f"cluster.sh {' '.join(words)}\n{log.read_text()[-3000:]}"

    def call(self, *words: object) -> str:
        """A command of SLURM (or any other) from `folder`; what it printed."""
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment,
            cwd=self.folder,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *words: object) -> str:
        """Submits; the job's id."""
        return self.call("sbatch", "--parsable", *words).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job; of the first task, for an array."""
        words = self.call("scontrol", "show", "job", "--oneliner", job).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def states(self, job: str) -> list[str]:
        """States of a job, or of all tasks of an array."""
        lines = self.call("scontrol", "show", "job", "--oneliner", job).splitlines()
        return [line.split("JobState=")[1].split()[0] for line in lines]

    def over(self, job: str) -> bool:
        """Whether no task of the job is still to run."""
        going = [
            "PENDING",
            "RUNNING",
            "COMPLETING",
            "CONFIGURING",
            "REQUEUED",
            "SUSPENDED",
            "SIGNALING",
        ]
        return not any(state in going for state in self.states(job))

    def wait(self, *jobs: str, seconds: float = 240) -> None:
        """Until jobs have COMPLETED; shows the logs of those that have not."""
        for job in jobs:
            try:
                until(lambda job=job: self.over(job), f"job {job} is over", seconds)
            except AssertionError as error:
                raise AssertionError(f"{error}: {self.states(job)}\n{self.logs(job)}") from None
            assert set(self.states(job)) == {"COMPLETED"}, f"{self.facts(job)}\n{self.logs(job)}"

    def logs(self, job: str) -> str:
        """The end of what the job printed, without progress bars."""
        texts = [path.read_text() for path in sorted(self.folder.rglob(f"*-{job}*.out"))]
        lines = "\n".join(texts).replace("\r", "\n").splitlines()
        return "\n".join(line for line in lines if "pairs/s" not in line)[-6000:]


def up(folder: Path, number: int, num_nodes: int) -> Cluster:
    """Starts a cluster that dies with this process, whatever becomes of it."""
    settings = {
        "SLURM_TEST_ID": str(number),
        "SLURM_TEST_OWNER": str(os.getpid()),
        "NODES": str(num_nodes),
        "GRACE": "10",
        "SLURM_CONF": f"/tmp/slurm-test-{number}/slurm.conf",
        "PATH": path_with_sbin(),
        "WANDB_API_KEY": SECRET,
    }
    cluster = Cluster(folder, environment(**settings))
    cluster.control("up")
    return cluster


def until(true: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """The first value of `true()` that is one; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := true():
            return value
        time.sleep(0.1)
    raise AssertionError(f"after {seconds} s not yet: {what}")


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file that may be growing; none where there is no file."""
    text = path.read_text() if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
