"""SIGSTOP or SIGKILL of a random rank at a random moment, from its start to its end: do the others end, naming it?

    python tools/bench/bench_stops.py [--num 60] [--at_once 4] [--seed 0] [--kills 0.25] [--until 1.1] [--out DIR]

The hang limit is 30 seconds. A stop is good where all other ranks end within 45 seconds of it and say which rank is to
blame, or where the run had done its work. Exits with 1 where one was not. Takes a minute for `at_once` stops.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tools.bench.forked_trainings import begin

HANG_SECONDS, SECONDS_TO_END = 30, 45
NUM_RANKS = 3


@dataclass
class Stop:
    """A rank that was stopped, and what came of it."""

    rank: int
    signal: str
    moment: str
    """The last that it had reached."""
    seconds: float | None = None
    """From the stop to the end of the last of the other ranks; None where they had to be killed."""
    codes: tuple[int | None, ...] = ()
    named: str = ""
    """What was said of the cause."""
    verdict: str = ""


class Started:
    """A training of several ranks that will be stopped at a moment of its life."""

    def __init__(self, ranks: list[Any], log: Path, after: float, rank: int, number: int) -> None:
        self.ranks, self.log, self.rank, self.number = ranks, log, rank, number
        self.stop_at = time.monotonic() + after
        self.stopped_at = 0.0
        self.stop: Stop | None = None

    def advance(self) -> bool:
        """Do what is due; return False once it is over."""
        now = time.monotonic()
        codes = [rank.poll() for rank in self.ranks]
        if self.stop is None:
            if codes[self.rank] is not None:
                return False  # it had ended before
            if now >= self.stop_at:
                victim = self.ranks[self.rank]
                os.kill(victim.pid, self.number)
                name = signal.Signals(self.number).name
                self.stop, self.stopped_at = Stop(self.rank, name, victim.moment), now
            return True
        others = [code for rank, code in enumerate(codes) if rank != self.rank]
        if None in others and now - self.stopped_at < 3 * SECONDS_TO_END:
            return True
        if None not in others:
            self.stop.seconds = round(now - self.stopped_at, 1)
        self.stop.codes = tuple(codes)
        self.end()
        self._set_verdict(self.stop)
        return False

    def end(self) -> None:
        """Kill what is left of it: a stopped process never ends by itself."""
        for rank in self.ranks:
            rank.kill()
        while any(rank.poll() is None for rank in self.ranks):
            time.sleep(0.01)

    def _set_verdict(self, stop: Stop) -> None:
        said = [Path(f"{self.log}.{rank.number}").read_text() for rank in self.ranks]
        lines = [
            line
            for text in said
            for line in text.splitlines()
            if line.startswith("pal-ds: error") or "the ranks could not meet" in line
        ]
        stop.named = lines[0] if lines else ""
        others = [code for rank, code in enumerate(stop.codes) if rank != stop.rank]
        traced = any("Traceback" in text for text in said)
        if stop.seconds is None or stop.seconds > SECONDS_TO_END:
            stop.verdict = "LATE"
        elif others == [0] * len(others):
            stop.verdict = "had done its work"
        elif traced or any(code != 5 for code in others):
            stop.verdict = "WRONG END"
        elif not any(f"rank {stop.rank} " in line for line in lines):
            stop.verdict = "WRONG RANK"
        else:
            stop.verdict = "named"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--num", type=int, default=60, help="stops")
    parser.add_argument("--at_once", type=int, default=4, help="trainings at a time")
    parser.add_argument("--kills", type=float, default=0.25, help="share of SIGKILL among them")
    parser.add_argument(
        "--until", type=float, default=1.1, help="last stop, in lives of a training; 0.3: its start"
    )
    options, folder, generator = begin(parser, "bench_stops")

    from tests.engine.kills import command, make_place
    from tests.warm import fork_ranks

    recipe = make_place(folder, hang_minutes=HANG_SECONDS / 60)

    def start(number: int) -> tuple[list[Any], Path]:
        # Data of its own, so that stops fall into `prepare`, too.
        words = (f"--config={recipe}", f"--run_dir={folder}/run_{number}")
        train = command("train", *words, f"--data.path={folder}/data_{number}")
        log = folder / f"log_{number}"
        return fork_ranks(NUM_RANKS, train, log), log

    life = undisturbed(start)
    running: list[Started] = []
    stops: list[Stop] = []
    begun, number = time.monotonic(), 0
    try:
        while len(stops) < options.num:
            while len(running) < min(options.at_once, options.num - len(stops)):
                number += 1
                ranks, log = start(number)
                after, rank = (
                    generator.uniform(0, options.until * life),
                    generator.randrange(NUM_RANKS),
                )
                kind = signal.SIGKILL if generator.random() < options.kills else signal.SIGSTOP
                running.append(Started(ranks, log, after, rank, kind))
            for one in [one for one in running if not one.advance()]:
                running.remove(one)
                if one.stop is not None:
                    stops.append(one.stop)
                    print(f"{len(stops)}: {one.stop}", file=sys.stderr, flush=True)
            time.sleep(0.02)
    finally:
        for one in running:
            one.end()
    report(stops, life, time.monotonic() - begun)


def undisturbed(start: Any) -> float:
    """Seconds that a training takes which nobody stops; the first one builds what the others find."""
    from tests.warm import wait_for

    seconds = 0.0
    for number in (-1, 0):
        begin = time.monotonic()
        ranks, log = start(number)
        codes = wait_for(ranks, seconds=120)
        assert codes == [0] * NUM_RANKS, f"{codes}: {Path(f'{log}.0').read_text()[-3000:]}"
        seconds = time.monotonic() - begin
    return seconds


def report(stops: list[Stop], life: float, seconds: float) -> None:
    """Print the figures as JSON; exits with 1 where a stop was not found in time, or blamed on another."""
    bad = [asdict(stop) for stop in stops if stop.verdict.isupper()]
    found = [stop.seconds for stop in stops if stop.seconds is not None]
    figures = {
        "stops": len(stops),
        "verdicts": dict(Counter(stop.verdict for stop in stops)),
        "moments": dict(Counter(stop.moment for stop in stops)),
        "slowest_seconds": max(found, default=None),
        "bad": bad,
        "undisturbed_seconds": round(life, 1),
        "seconds": round(seconds),
    }
    print(json.dumps(figures, indent=2))
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
