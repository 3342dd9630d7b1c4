"""Runs a target on damaged files: for some examples in the suite, for some time by `make fuzz`.

python -m tests.fuzz.fuzz --seconds 600 [TARGET ...]
"""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import hypothesis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from pal_ds.errors import UserError
from pal_ds.feature_cache.shards import DamagedShardError
from tests.fuzz.mutations import BY_ENDING, of_bytes
from tests.fuzz.targets import TARGETS, silent

REFUSALS = (UserError, DamagedShardError)
"""What a reader may raise; a damaged shard of a cache is computed anew."""
SECONDS_OF_A_BATCH = 3
MOST_OF_A_BATCH = 100


class Fuzzer:
    """One target with its valid files in a folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.target, self.valid, self.work = TARGETS[name], folder / "valid" / "it", folder / "it"
        self.valid.mkdir(parents=True)
        if name == "prepared":
            self.valid.rmdir()
        self.target.make(self.valid)
        self.names = self.target.damaged(self.valid)
        self.outcomes: Counter[str] = Counter()
        for _ in range(2):  # the first time imports what it needs
            self._fill()
            start = time.monotonic()
            with silent():
                self.undamaged = str(self.target.read(self.work))
        self.seconds = time.monotonic() - start
        """Time that one reading takes."""

    def _fill(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.valid, self.work)

    def try_one(self, data: st.DataObject) -> None:
        """Damage a file and read. Raises AssertionError for a silent change that the format could have noticed."""
        name = data.draw(st.sampled_from(self.names), label="file")
        inner = BY_ENDING.get(Path(name).suffix, of_bytes)
        mutate = data.draw(st.sampled_from([of_bytes, inner]), label="kind")
        seals = self.target.seal is not None and data.draw(st.booleans(), label="with hashes")
        before = (self.valid / name).read_bytes()
        content = mutate(data.draw, before)
        self._fill()
        (self.work / name).unlink()
        (self.work / name).write_bytes(content)
        if seals and self.target.seal is not None:
            self.target.seal(self.work, name)
        with silent():
            try:
                found = str(self.target.read(self.work))
            except REFUSALS:
                self.outcomes["refused"] += 1
                return
        same = found == self.undamaged
        self.outcomes["same" if same else "other values"] += 1
        notices = (self.target.seal is not None and not seals) or name.endswith("manifest.json")
        assert same or not notices, f"{name}: damage passed in silence"


def fuzz(fuzzer: Fuzzer, num_examples: int, *, seed: int | None = None) -> None:
    """Try so many examples, the same each time or those of a seed; raises what goes wrong for the smallest of them."""

    @settings(
        max_examples=num_examples,
        deadline=None,
        database=None,
        derandomize=seed is None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
    )
    @hypothesis.given(st.data())
    def attempt(data: st.DataObject) -> None:
        fuzzer.try_one(data)

    (attempt if seed is None else hypothesis.seed(seed)(attempt))()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0, help="of the first batch of examples")
    options = parser.parse_args()
    failed = 0
    if unknown := set(options.targets) - set(TARGETS):
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(TARGETS)}")
    for name in options.targets or TARGETS:
        with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:
            fuzzer = Fuzzer(name, Path(folder))
            size = max(10, min(MOST_OF_A_BATCH, int(SECONDS_OF_A_BATCH / fuzzer.seconds)))
            start, seed, failures = time.monotonic(), options.seed, 0
            while time.monotonic() - start < options.seconds:
                try:
                    fuzz(fuzzer, size, seed=seed)
                except Exception as error:
                    failures += 1
                    print(f"{name}, seed {seed}: {type(error).__name__}: {error}", flush=True)
                    sys.excepthook(type(error), error, error.__traceback__)
                seed += 1
            failed += failures
            outcomes = ", ".join(f"{count} {what}" for what, count in fuzzer.outcomes.most_common())
            print(
                f"{name}: {time.monotonic() - start:.0f} s, {outcomes}; {failures} batches failed"
            )
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
