"""SIGKILL of a random rank of two at random moments: does the run resume, and end where an undisturbed one ends?

    python tools/bench/bench_kill.py [--num_kills 100] [--kills_per_run 1] [--seed 0] [--out runs/bench_kill]

Half of the kills come at a random time after the start, three tenths at a random stage of a save, the rest while
tools/consolidate.py writes. Exits with 1 where anything was lost. Takes about ten minutes on two cores.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.forked_trainings import begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--num_kills", type=int, default=100)
    parser.add_argument(
        "--kills_per_run", type=int, default=1, help="of training, before a run may end"
    )
    options, folder, generator = begin(parser, "bench_kill")

    from tests.engine.kills import Harness, make_place

    harness = Harness(folder, make_place(folder))
    num_exports = options.num_kills // 5
    started = time.monotonic()
    figures = kill_trainings(
        harness, generator, options.num_kills - num_exports, options.kills_per_run
    )
    figures |= kill_exports(harness, generator, num_exports)
    figures["seconds"] = round(time.monotonic() - started)
    from environment import describe_environment

    print(json.dumps({**figures, "environment": describe_environment()}, indent=2))
    sys.exit(0 if not figures["lost"] else 1)


def kill_trainings(harness: Any, generator: random.Random, count: int, kills_per_run: int) -> dict:
    """Kills, resumes, compares; whatever went wrong is a line of `lost`."""
    stages: Counter[str] = Counter()
    survivors: Counter[str] = Counter()
    lost, waits, num_values = [], [], 0
    while sum(stages.values()) < count:
        run = _new_run(harness, sum(stages.values()))
        wanted = min(kills_per_run, count - sum(stages.values()))
        newest, done = 0, []
        try:
            while len(done) < wanted:
                killed = kill_once(harness, run, generator)
                newest = harness.check_published(run, at_least=newest)
                if killed is None:
                    break
                done.append(killed)
            harness.finish(run)
            num_values += harness.check_same(run)
            harness.discard(run)
        except (AssertionError, TimeoutError) as error:
            lost.append(f"{run.path.name}, {done}: {str(error)[-2000:]}")
        for killed in done:
            stages[f"rank {killed.rank}, {killed.moment}"] += 1
            survivors[f"exit {killed.survivor}"] += 1
            waits.append(killed.seconds_to_end)
        print(f"{sum(stages.values())} kills, {len(lost)} runs lost", file=sys.stderr, flush=True)
    return {
        "training_kills": sum(stages.values()),
        "lost": lost,
        "values_compared": num_values,
        "by_stage": dict(sorted(stages.items())),
        "survivors": dict(survivors),
        "slowest_survivor_seconds": round(max(waits, default=0.0), 2),
        "undisturbed_run_seconds": round(harness.seconds, 2),
    }


def kill_once(harness: Any, run: Any, generator: random.Random) -> Any:
    """One kill at a random time, or at a random stage of a save; None where the run had ended before."""
    from tests.engine.kills import draw
    from tests.warm import kill_at

    if generator.random() < 5 / 8:
        seconds = generator.uniform(0, harness.seconds)
        return harness.kill_after(run, seconds, generator.randrange(2))
    rank, moment = draw(generator)
    killed = harness.kill_at(run, kill_at(rank, moment, generator.randint(1, 2)), rank)
    return killed if killed.survivor != 0 else None


def kill_exports(harness: Any, generator: random.Random, count: int) -> dict:
    """Kills of consolidation: no folder or a whole one, and a repeat that works."""
    from tests.engine.kills import contents, export_once
    from tests.warm import KILLED, wait_for

    folder = harness.folder
    begin = time.monotonic()
    assert wait_for([export_once(harness.whole, folder / "export", folder / "export.log")]) == [0]
    seconds, wanted = time.monotonic() - begin, contents(folder / "export")
    outcomes: Counter[str] = Counter()
    while sum(outcomes.values()) < count:
        out = folder / "out" / "export"
        shutil.rmtree(out.parent, ignore_errors=True)
        process = export_once(harness.whole, out, folder / "export.log")
        time.sleep(generator.uniform(0, seconds))
        process.kill()
        if wait_for([process]) != [KILLED]:
            continue
        outcome = "no folder" if not out.exists() else "a whole folder"
        if out.exists() and contents(out) != wanted:
            outcome = "HALF A FOLDER"
        elif not out.exists():
            repeated = wait_for([export_once(harness.whole, out, folder / "export.log")])
            left = [path.name for path in out.parent.iterdir()]
            if repeated != [0] or contents(out) != wanted or left != ["export"]:
                outcome = "REPEAT FAILED"
        outcomes[outcome] += 1
    return {"export_kills": sum(outcomes.values()), "exports": dict(outcomes)}


def _new_run(harness: Any, number: int) -> Any:
    from pal_ds.runs.run_dir import RunDirectory

    return RunDirectory(harness.folder / f"run_{number}")


if __name__ == "__main__":
    main()
