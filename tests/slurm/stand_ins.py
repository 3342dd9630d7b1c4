"""One start of a batch script without a cluster: srun, scontrol and sleep are stand-ins."""

import os
import signal as signal_module
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from tests.spawn import ROOT

SRUN = """#!/bin/bash
case "$*" in
  *" true") exit {answer} ;;
  *"pal_ds prepare"*)
    echo "srun $*" >>"$CALLS"
    trap 'exit 140' USR2
    [ {prepare_seconds} = 0 ] || {{ /bin/sleep {prepare_seconds} >/dev/null 2>&1 & wait $!; }}
    exit 0
    ;;
esac
echo "srun $*" >>"$CALLS"
printf '%s' "$MASTER_PORT" >"$CALLS.port"
[ -z '{silent}' ] || : >"$CALLS.{silent}"
[ -z '{shards}' ] || mktemp -p '{shards}' --suffix=.safetensors >/dev/null
[ -z '{status}' ] || printf '%s\\n' '{status}' >"$RUN/status.json"
[ -z '{checkpoint}' ] || printf '{{"step": %s}}\\n' '{checkpoint}' >"$RUN/latest.json"
trap 'echo "rank got USR2" >>"$CALLS"; exit {code}' USR2
[ -z '{leftover}' ] || {{
  {leftover} >/dev/null 2>&1 &
  until [ -e "$RUN/lock" ]; do /bin/sleep 0.05; done
}}
[ {seconds} = 0 ] || {{ /bin/sleep {seconds} >/dev/null 2>&1 & wait $!; }}
exit {code}
"""
SCONTROL = """#!/bin/bash
case "$1" in
  # As a controller that is being restarted: silent where someone has said so, once or for good.
  show) rm "$CALLS.silent" 2>/dev/null && exit 1
        [ ! -e "$CALLS.gone" ] || exit 1
        echo "   JobState={state} Restarts={restarts} PreemptTime={preempted} EndTime={end}"
        echo "   Command={root}/slurm/{script}.sbatch x --y z" ;;
  requeue) [ -z '{refused}' ] || exit 1
        echo "requeue $2" >>"$CALLS" ;;
esac
"""
# Waiting for SLURM to end the job would take minutes; a newer start is looked for every minute.
SLEEP = """#!/bin/bash
case $1 in ? | ?.?) exec /bin/sleep "$1" ;; 60) exec /bin/sleep 0.6 ;; esac
"""


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
    refused: str = ""
    leftover: str = ""
    shards: str = ""
    """A folder that gets another shard from each start."""
    prepare_seconds: float = 0
    recipe: str = "train: {}\n"
    recipe_name: str = "recipe.yaml"
    variables: dict[str, str] = field(default_factory=dict)

    def begin(self, *words: str, script: str = "train") -> "subprocess.Popen[str]":
        bin_ = self.folder / "bin"
        bin_.mkdir(parents=True, exist_ok=True)
        scripts = {"srun": SRUN, "scontrol": SCONTROL}
        for name, text in scripts.items():
            (bin_ / name).write_text(text.format(**vars(self), root=ROOT, script=script))
        (bin_ / "sleep").write_text(SLEEP)
        for path in bin_.iterdir():
            path.chmod(0o755)
        (self.folder / self.recipe_name).write_text(self.recipe)
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
            ["bash", str(ROOT / "slurm" / f"{script}.sbatch"), self.recipe_name, *words],
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

    def signalled(
        self, signal: str, when: str, *words: str, script: str = "train"
    ) -> tuple[int, str]:
        """A start that is sent a signal three times once `when` has been called."""
        process = self.begin(*words, script=script)
        while process.poll() is None and not (
            self.calls.is_file() and when in self.calls.read_text()
        ):
            time.sleep(0.05)
        time.sleep(0.2)
        for _ in range(3):
            process.send_signal(signal_module.Signals[f"SIG{signal}"])
        log = process.communicate(timeout=30)[0]
        return process.returncode, log

    def requeued(self) -> bool:
        return self.calls.is_file() and "requeue 7" in self.calls.read_text()

    def srun(self) -> str:
        return next(line for line in self.calls.read_text().splitlines() if line[:4] == "srun")
