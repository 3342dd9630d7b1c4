"""What adapt.sbatch decides, without a cluster: which arrays it takes, and what a start that is cut off leaves."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.spawn import ROOT

SRUN = """#!/bin/bash
echo "srun $*" >>"$CALLS"
words=("$@")
case "$*" in
  *" cut "*) echo "a line" >"${words[-1]}" ;;
  *" merge "*) [ ! -e "$CALLS.killed" ] || { rm "$CALLS.killed"; kill -9 $PPID; } ;;
  *"distributed.slurm adapt"*) for word in "$@"; do case $word in --out=*.part) mkdir "${word#*=}" ;; esac; done ;;
esac
"""


class Adapting:
    """Tasks of adapt.sbatch in a folder whose name holds a space, as that of the scripts does."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder, self.calls = tmp_path / "a folder", tmp_path / "calls"
        (self.folder / "bin").mkdir(parents=True)
        (self.folder / "repository").symlink_to(ROOT)
        scripts = {
            "srun": SRUN,
            "scontrol": f"#!/bin/bash\necho '   Command={self.folder}/repository/slurm/adapt.sbatch R P O'\n",
        }
        for name, text in scripts.items():
            (self.folder / "bin" / name).write_text(text)
            (self.folder / "bin" / name).chmod(0o755)

    def task(self, number: int, last: int, first: int = 0) -> tuple[int, str]:
        """Exit code and log of one task of an array from `first` to `last`."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
        array = {"ID": number, "MIN": first, "MAX": last, "COUNT": last - first + 1}
        variables = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()}
        own = {"SLURM_JOB_ID": "7", "SLURM_ARRAY_JOB_ID": "7", "SLURM_SUBMIT_DIR": "/nowhere"}
        path = {"PATH": f"{self.folder / 'bin'}:{kept['PATH']}", "CALLS": str(self.calls)}
        done = subprocess.run(
            ["bash", ROOT / "slurm" / "adapt.sbatch", "a run", "new pairs.jsonl", "the users"],
            env=kept | variables | own | path,
            cwd=self.folder,
            text=True,
            capture_output=True,
        )
        return done.returncode, done.stdout + done.stderr

    def merges(self) -> int:
        return self.calls.read_text().count(" merge ")


def test_the_last_shard_merges(tmp_path: Path) -> None:
    adapting = Adapting(tmp_path)
    assert [adapting.task(shard, 1)[0] for shard in (1, 0)] == [0, 0]
    assert adapting.merges() == 1
    shards = adapting.folder / "the users" / "shards"
    assert sorted(path.name for path in shards.iterdir()) == ["0", "1", "count"]
    # In the container, as ranks run.
    calls = adapting.calls.read_text().splitlines()
    assert len(calls) == 5 and all("--ntasks=1" in call for call in calls if "user_shards" in call)


def test_a_start_that_was_cut_off_before_it_merged_does_so_when_requeued(tmp_path: Path) -> None:
    adapting = Adapting(tmp_path)
    adapting.task(0, 1)
    Path(f"{adapting.calls}.killed").touch()
    assert adapting.task(1, 1)[0] == -9
    code, log = adapting.task(1, 1)
    assert code == 0 and "2 of 2 shards are done" in log and adapting.merges() == 2
    assert adapting.calls.read_text().count(" cut ") == 2


@pytest.mark.parametrize("first", [1, 2])
def test_an_array_that_would_never_merge_is_refused(tmp_path: Path, first: int) -> None:
    adapting = Adapting(tmp_path)
    code, log = adapting.task(first, 3, first)
    assert code == 2 and "--array=0-3" in log and not adapting.calls.exists()
    # Shards of an OUT that was begun whole may be made again by themselves.
    adapting.task(0, 3)
    assert adapting.task(first, 3, first)[0] == 0
