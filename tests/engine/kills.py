"""Kills ranks of a tiny run at chosen or random moments, starts it again, and compares it with one left in peace.

For a parent that called `warm_up`: every start forks two ranks from it.
"""

import functools
import json
import os
import random
import shutil
import signal
import time
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from pal_ds.engine.checkpoint.verify import verify_checkpoint
from pal_ds.runs.run_dir import RunDirectory
from tests.engine.newest import newest_intact
from tests.same_run import figures, leaves, load
from tests.tiny import LLAMA, write_pairs
from tests.warm import KILLED, Hook, Rank, fork_ranks, kill_at, wait_for

NUM_RANKS = 2
MOMENTS_OF_RANK_0 = (
    *("save begins", "directory made", "inside a shard", "a shard written", "shards written"),
    *("users written", "hashed", "manifest written", "renamed", "latest.json written"),
    *("best.json written", "renamed for deletion", "a checkpoint deleted"),
)
"""Every stage of a save, in order."""
MOMENTS = {0: MOMENTS_OF_RANK_0, 1: MOMENTS_OF_RANK_0[:5]}
"""By rank: what one alone does, the other never reaches."""
RECIPE: dict[str, Any] = {
    "backbone": {
        "architecture": {
            **LLAMA,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
        }
    },
    "head": {
        "class_path": "PalA",
        "init_args": {"num_prototypes": 3, "dropout": 0.1, "mixture": "gumbel"},
    },
    "optim": {"learning_rate": 3e-3, "backbone_learning_rate": 1e-3},
    "train": {
        "ds_config": "tests/ds/zero3.json",
        "batch_pairs": 16,
        "micro_batch_pairs": 4,
        "epochs": 2,
        "log_every": 1,
        "save_every": 2,
        "eval_every": 3,
        "keep_checkpoints": 2,
    },
}


def command(*words: object) -> Callable[[], None]:
    """A command of pal_ds whose parser is built now, in the parent, as that costs most of a second."""
    from pal_ds.cli import main as cli

    parser = cli.build_parser(str(words[0]))

    def run() -> None:
        # Put back: the next command of this process has a parser of its own.
        with unittest.mock.patch.object(cli, "build_parser", lambda *_: parser):
            cli.main([str(word) for word in words])

    return run


def make_place(folder: Path, **train: object) -> Path:
    """Prepared data and a recipe for them; returns the recipe."""
    pairs = write_pairs(folder / "pairs.jsonl", 64)
    data = {
        "path": str(folder / "data"),
        "source": {"class_path": "Jsonl", "init_args": {"path": str(pairs)}},
        "vocab_size": 400,
        "max_length": 64,
        "dev_fraction": 0.2,
        "test_fraction": 0.0,
    }
    recipe = {**RECIPE, "data": data, "train": {**RECIPE["train"], **train}}
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


@dataclass
class Killed:
    """One kill and what came of it."""

    rank: int
    moment: str
    """The last that the killed rank had reached."""
    survivor: int | None = None
    """Exit status of the other rank; negative where the harness had to stop it."""
    seconds_to_end: float = 0.0
    """From the kill to the end of the other rank."""


@dataclass
class Harness:
    """A recipe, the run it makes undisturbed, and how to start it."""

    folder: Path
    recipe: Path
    whole: RunDirectory = field(init=False)
    seconds: float = field(init=False)
    """An undisturbed run takes."""

    def __post_init__(self) -> None:
        self.whole = RunDirectory(self.folder / "whole")
        # Data are prepared in the first start; the second tells how long the others take.
        self.finish(RunDirectory(self.folder / "first"))
        begin = time.monotonic()
        self.finish(self.whole)
        self.seconds = time.monotonic() - begin

    def start(self, run: RunDirectory, hook: Hook | None = None) -> list[Rank]:
        train = command("train", f"--config={self.recipe}", f"--run_dir={run.path}")
        return fork_ranks(NUM_RANKS, train, self.log(run), hook)

    def log(self, run: RunDirectory) -> Path:
        return run.path.with_name(run.path.name + ".log")

    def finish(self, run: RunDirectory) -> None:
        """Starts a run, which must come to its end."""
        codes = wait_for(self.start(run), seconds=120)
        assert codes == [0] * NUM_RANKS, (
            f"{codes}: {Path(f'{self.log(run)}.0').read_text()[-3000:]}"
        )

    def kill_at(self, run: RunDirectory, hook: Hook, victim: int) -> Killed:
        """A start in which `hook` kills a rank."""
        ranks = self.start(run, hook)
        return self._reap(ranks, victim)

    def kill_after(self, run: RunDirectory, seconds: float, victim: int) -> Killed | None:
        """A start that is killed after a time; None where it had ended before."""
        ranks = self.start(run)
        time.sleep(seconds)
        ranks[victim].kill()
        killed = self._reap(ranks, victim)
        return killed if ranks[victim].code == KILLED else None

    def _reap(self, ranks: list[Rank], victim: int) -> Killed:
        while ranks[victim].poll() is None:
            time.sleep(0.002)
        killed = Killed(victim, ranks[victim].moment)
        begin = time.monotonic()
        wait_for(ranks)
        killed.survivor = ranks[1 - victim].code
        killed.seconds_to_end = time.monotonic() - begin
        return killed

    def check_published(self, run: RunDirectory, at_least: int = 0) -> int:
        """What is published is intact, and not older than `at_least`; returns its newest step, 0 for none."""
        for step in run.complete_steps():
            verify_checkpoint(run.checkpoint(step))
        latest, newest = run.pointer("latest"), max(run.complete_steps(), default=0)
        if latest is not None:
            assert latest["step"] in run.complete_steps(), f"latest.json names {latest}"
        found = newest_intact(run)
        assert newest == (found[1]["step"] if found else 0) >= at_least
        return newest

    def check_same(self, run: RunDirectory) -> int:
        """A finished run holds to the bit what the undisturbed one holds; returns the number of values compared."""
        wanted, found = self.whole, run
        names = [sorted(path.name for path in r.checkpoints.iterdir()) for r in (wanted, found)]
        assert names[0] == names[1]
        num_values = 0
        for step in wanted.complete_steps():
            files = verify_checkpoint(wanted.checkpoint(step))["files"]
            assert verify_checkpoint(found.checkpoint(step))["files"].keys() == files.keys()
            for name in files:
                one, other = (r.checkpoint(step) / name for r in (wanted, found))
                read = load if name.endswith(".pt") else load_file
                if name.endswith(".arrow"):
                    assert one.read_bytes() == other.read_bytes(), name
                    continue
                for a, b in leaves(read(one), read(other)):
                    same = a.equal(b) if hasattr(a, "equal") else a == b
                    assert same, f"{name} of step {step}"
                    num_values += 1
        assert figures(found.path) == figures(wanted.path)
        assert [wanted.pointer(n) for n in ("best", "latest")] == [
            found.pointer(n) for n in ("best", "latest")
        ]
        return num_values

    def discard(self, run: RunDirectory) -> None:
        shutil.rmtree(run.path)
        for rank in range(NUM_RANKS):
            Path(f"{self.log(run)}.{rank}").unlink()


@functools.cache
def harness_in(folder: str) -> Harness:
    """The one of this folder, whose undisturbed run is made once."""
    return Harness(Path(folder), make_place(Path(folder)))


def export_once(run: RunDirectory, out: Path, log: Path, hook: Hook | None = None) -> Rank:
    """`tools/consolidate.py` in a forked process."""
    from tools.consolidate import main

    return fork_ranks(1, lambda: main([str(run.path), str(out)]), log, hook)[0]


def contents(folder: Path) -> dict[str, bytes]:
    """Name and content of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def draw(generator: random.Random) -> tuple[int, str]:
    """A random rank, and a random moment of a save that it reaches."""
    rank = generator.randrange(NUM_RANKS)
    return rank, generator.choice(MOMENTS[rank])


def kill_at_every_stage(folder: str) -> list[dict[str, Any]]:
    """Each rank killed at each moment of a save, one start after the other in one run until it ends; then another."""
    harness = harness_in(folder)
    told, run, newest = [], RunDirectory(harness.folder / "stages_0"), 0
    pending = [(rank, moment) for rank in MOMENTS for moment in MOMENTS[rank]]
    for number in range(3 * len(pending)):
        if not pending:
            break
        rank, moment = pending[0]
        killed = harness.kill_at(run, kill_at(rank, moment), rank)
        if killed.survivor == 0:
            # This run has no such moment before it any more.
            harness.check_same(run)
            run, newest = RunDirectory(harness.folder / f"stages_{number + 1}"), 0
            continue
        pending.pop(0)
        newest = harness.check_published(run, at_least=newest)
        told.append({"rank": rank, "moment": killed.moment, "newest": newest})
    harness.finish(run)
    told.append({"left": pending, "num_values": harness.check_same(run)})
    return told


def kill_before_the_last_deletion(folder: str) -> int:
    """Both ranks end between the last save and the deletion of old ones; returns `check_same` after another start."""
    harness = harness_in(folder)
    run, last = RunDirectory(harness.folder / "undeleted"), max(harness.whole.complete_steps())

    def hook(number: int, moment: str) -> None:
        done = run.pointer("latest") or {"step": 0}
        if number == 0 and moment == "latest.json written" and done["step"] == last:
            os.kill(os.getpid(), signal.SIGKILL)

    harness.kill_at(run, hook, 0)
    harness.finish(run)
    return harness.check_same(run)


def kill_at_random(folder: str, num_trainings: int, num_exports: int, seed: int) -> dict[str, Any]:
    """As tools/bench/bench_kill.py, several kills in a run."""
    from tools.bench.bench_kill import kill_exports, kill_trainings

    harness, generator = harness_in(folder), random.Random(seed)
    found = kill_trainings(harness, generator, num_trainings, kills_per_run=4)
    return found | kill_exports(harness, generator, num_exports)


def kill_exports_at_their_end(folder: str) -> list[dict[str, Any]]:
    """An export killed before and after it gets its name: is there a folder, does a repeat work, what is left?"""
    harness, told = harness_in(folder), []
    place = harness.folder
    for moment in ("folder written", "folder renamed"):
        out = place / moment.replace(" ", "_") / "out"
        codes = wait_for([export_once(harness.whole, out, place / "log", kill_at(0, moment))])
        existed = out.exists()
        if not existed:
            codes += wait_for([export_once(harness.whole, out, place / "log")])
        told.append(
            {
                "moment": moment,
                "codes": codes,
                "existed": existed,
                "left": [path.name for path in out.parent.iterdir()],
                "files": sorted(contents(out)),
            }
        )
    return told


def train(
    folder: str, name: str, train: dict[str, Any], num_ranks: int = NUM_RANKS
) -> dict[str, Any]:
    """A run of the tiny recipe; what it printed and its ranks' exit statuses."""
    place = Path(folder)
    recipe = make_place(place, **train)
    ranks = fork_ranks(
        num_ranks,
        command("train", f"--config={recipe}", f"--run_dir={place / name}"),
        place / f"{name}.log",
    )
    codes = wait_for(ranks, seconds=120)
    return {"codes": codes, "said": said(place / f"{name}.log", num_ranks)}


def said(log: Path, num_ranks: int = NUM_RANKS) -> list[str]:
    """What each rank has printed, which is then forgotten."""
    files = [Path(f"{log}.{rank}") for rank in range(num_ranks)]
    told = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return told
