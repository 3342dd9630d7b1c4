"""Trainings on the test cluster, and what happens to them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Cluster, rows, until
from tests.spawn import ROOT

SAVE_EVERY = 25
NEW_STEPS = 8
"""Updates that a start makes before it is disturbed."""


class Runs:
    """The trainings of this module: all are submitted at once, for the waits of one are the CPU time of another."""

    def __init__(self, cluster: Cluster, recipe: Path) -> None:
        self.cluster, self.recipe = cluster, recipe
        self.jobs: dict[str, str] = {}

    def path(self, name: str) -> Path:
        return self.cluster.folder / "runs" / name

    def submit_whole(self) -> None:
        """Through submit.py, as a person would."""
        words = ("--run_dir=runs/whole", "--nodes=2", "--cpus_per_task=1", "--time=20")
        tool = (sys.executable, ROOT / "tools" / "submit.py", "train", self.recipe.name)
        self.cluster.call(*tool, *words)
        self.jobs["whole"] = rows(self.path("whole") / "slurm" / "jobs.jsonl")[-1]["job"]

    def submit_hostfile(self) -> None:
        """No rank is started by SLURM, which only gives every node its launcher here."""
        (self.cluster.folder / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
        launcher = "deepspeed --hostfile hosts --no_ssh --node_rank $SLURM_NODEID --master_addr n1"
        words = (
            f"--config={self.recipe.name} --run_dir=runs/hostfile --train.stop_after={SAVE_EVERY}"
        )
        command = f"{launcher} --master_port 29777 --module pal_ds train {words}"
        self.jobs["hostfile"] = self.cluster.sbatch(
            "--nodes=2",
            "--nodelist=n1,n2",
            "--output=hostfile-%j.out",
            f"--wrap=srun bash -c '{command}'",
        )

    def submit(self, name: str, *options: str) -> None:
        shape = ("--nodes=2", "--cpus-per-task=1", "--time=20")
        script, run_dir = ROOT / "slurm" / "train.sbatch", f"--run_dir=runs/{name}"
        self.jobs[name] = self.cluster.sbatch(*shape, *options, script, self.recipe.name, run_dir)

    def starts(self, name: str) -> list[dict[str, Any]]:
        return rows(self.path(name) / "slurm" / "starts.jsonl")

    def at_work(self, name: str, num_starts: int) -> bool:
        """Whether start number `num_starts` (from 1) has made some updates, and none is being published now."""
        starts, made = self.starts(name), rows(self.path(name) / "metrics.jsonl")
        # Until it is ready the figures are those that the start before it left.
        if (
            len(starts) < num_starts
            or not made
            or self.log(name).count("ready at update") < num_starts
        ):
            return False
        step = made[-1]["step"]
        return step >= starts[-1]["checkpoint_step"] + NEW_STEPS and step % SAVE_EVERY > 2

    def go_through(self, name: str) -> None:
        """All events of a chain."""
        for number, event in enumerate(CHAINS[name], start=1):
            self.disturb(name, event, number)

    def disturb(self, name: str, event: Callable[["Runs", str], None], number: int) -> None:
        """Waits until start `number` is at work, and lets `event` happen to it."""
        what = f"{name}: start {number} is at work"
        try:
            until(lambda: self.at_work(name, number) or self.died(name), what, 240)
            assert not self.died(name)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.cluster.logs(self.jobs[name])}") from None
        event(self, name)

    def log(self, name: str) -> str:
        return (self.cluster.folder / f"pal-train-{self.jobs[name]}.out").read_text()

    def died(self, name: str) -> bool:
        return self.cluster.over(self.jobs[name])

    def nodes(self, name: str) -> list[str]:
        """Those of the last start, the one that runs the batch script first."""
        listed = self.cluster.call("scontrol", "show", "hostnames", self.starts(name)[-1]["nodes"])
        return listed.split()


def signal_before_the_limit(runs: Runs, name: str) -> None:
    """What --signal=B:USR2@180 does, without its granularity of 30 seconds."""
    runs.cluster.call("scancel", "--signal=USR2", "--batch", runs.jobs[name])


def requeue(runs: Runs, name: str) -> None:
    runs.cluster.call("scontrol", "requeue", runs.jobs[name])


def preempt(runs: Runs, name: str) -> None:
    """A job of a partition with priority wants the same nodes whole."""
    where = f"--nodelist={','.join(runs.nodes(name))}"
    out = "--output=/dev/null"
    wanted = ("--partition=high", "--nodes=2", "--exclusive", where, out, "--wrap=true")
    runs.cluster.sbatch(*wanted)


def power_off(runs: Runs, name: str) -> None:
    """The node that does not run the batch script; it comes back when SLURM has given the job up there."""
    lost = runs.nodes(name)[1]
    runs.cluster.control("kill-node", lost)
    until(lambda: restarts(runs, name) == len(runs.starts(name)), f"{name} is requeued", 120)
    runs.cluster.control("start-node", lost)


def kill_slurmd(runs: Runs, name: str) -> None:
    """On the node of the batch script: it and rank 0 live on when SLURM starts the job again elsewhere."""
    lost, before = runs.nodes(name)[0], len(runs.starts(name))
    runs.cluster.control("kill-slurmd", lost)
    # SLURM finds out by itself after SlurmdTimeout and more; by then a run as short as this one might be over.
    runs.cluster.call("scontrol", "update", f"nodename={lost}", "state=down", "reason=slurmd")
    until(
        lambda: len(runs.starts(name)) > before or runs.died(name), f"{name} goes on elsewhere", 120
    )
    runs.cluster.control("start-slurmd", lost)


def restarts(runs: Runs, name: str) -> int:
    return int(runs.cluster.facts(runs.jobs[name])["Restarts"])


CHAINS: dict[str, tuple[Callable[[Runs, str], None], ...]] = {
    "asked": (preempt, signal_before_the_limit, requeue),
    "broken": (kill_slurmd, power_off),
}
"""Runs by name, and what happens to each: once per start."""
PLACES = {"asked": "--nodelist=n3,n4", "broken": "--exclude=n1,n2,n3,n4"}
UPDATES_MADE_AGAIN = {
    signal_before_the_limit: 0,
    requeue: 0,
    preempt: 0,
    power_off: SAVE_EVERY,
    kill_slurmd: SAVE_EVERY,
}
"""At most; none where there is time to save."""
