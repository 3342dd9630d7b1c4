"""Signs of life of the ranks, and the verdict on who is to blame when a job cannot go on. No network here.

What a process does is read from its threads' frames without stopping them. The caller passes the time, so that every
rule can be tested without waiting.
"""

import dis
import re
import sys
import threading
from collections import Counter
from collections.abc import Collection, Container, Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from pal_ds.errors import RankLostError


class Beat(NamedTuple):
    """A sign of life of a rank."""

    rank: int
    host: str
    phase: str
    step: int
    """Updates made so far."""
    seconds: float
    """Time in this phase when the sign was sent."""
    num_entered: int
    """Phases entered by this process: it grows wherever there is progress."""
    num_in_step: int
    """Phases entered since the step last changed: with the step, how far this rank is, comparable between ranks."""
    where: str
    """The line at which the main thread is."""
    waiting: bool
    """True where the process waits for other ranks inside a collective."""
    patience: float = 1.0
    """Factor by which the phase may take longer than others."""

    def __str__(self) -> str:
        return f"`{self.phase}` at update {self.step}"


class Failure(NamedTuple):
    """An exception that ends a rank."""

    rank: int
    text: str
    code: int
    """Exit code of the rank."""
    symptom: bool
    """Raised where ranks meet, so that another rank may be the cause."""


class Verdict(NamedTuple):
    """The reason why the job ends. `kind` is `hung`, `died` or `failed`."""

    kind: str
    ranks: tuple[int, ...]
    text: str
    code: int = RankLostError.exit_code

    @property
    def may_be_shared(self) -> bool:
        """Return True where all ranks may be about to raise the same, as they mostly do for what a person can mend."""
        return self.code != RankLostError.exit_code


def blamed(beats: Sequence[Beat], silent: Collection[int] = ()) -> tuple[int, ...]:
    """The ranks that the others wait for: silent ones, else those outside collectives, else all; the least far of them.

    Being inside a collective is decisive on gloo, where it blocks. Under CUDA ranks may wait anywhere, and how far
    they have come tells them apart.
    """
    candidates = [beat for beat in beats if beat.rank in silent]
    candidates = candidates or [beat for beat in beats if not beat.waiting] or list(beats)
    least = min((beat.step, beat.num_in_step) for beat in candidates)
    return tuple(sorted(beat.rank for beat in candidates if (beat.step, beat.num_in_step) == least))


class Ledger:
    """All that rank 0 has heard of the ranks, and the verdict that follows from it."""

    def __init__(
        self,
        hang_seconds: float,
        patience_seconds: float,
        stacks: Path | None,
        awaited: Iterable[int] = (),
    ) -> None:
        self.hang_seconds = hang_seconds
        self.patience_seconds = patience_seconds
        """Time that a symptom waits for its cause."""
        self.stacks = stacks
        """Folder of the stacks, for the message."""
        self._beats: dict[int, tuple[Beat, float]] = {}
        self._progress_at = 0.0
        self._failures: dict[int, tuple[Failure, float]] = {}
        self._died: list[tuple[int, float]] = []
        self._awaited = set(awaited)
        """Ranks that were not heard of yet, and are lost where they are not within `hang_seconds`."""

    def hear(self, beat: Beat, now: float) -> None:
        self._awaited.discard(beat.rank)
        known = self._beats.get(beat.rank)
        if known is None or known[0].num_entered != beat.num_entered:
            self._progress_at = now
        self._beats[beat.rank] = (beat, now)

    def awaits(self, now: float) -> bool:
        """Return True while ranks that were not heard of yet may still come."""
        return bool(self._awaited) and now <= self.hang_seconds

    def failed(self, failure: Failure, now: float) -> None:
        self._failures.setdefault(failure.rank, (failure, now))

    def died(self, rank: int, now: float) -> None:
        """Note a rank whose connection ended and that has said neither `left` nor `failed`."""
        if rank in self._beats and rank not in self._failures:
            self._died.append((rank, now))

    def left(self, rank: int) -> None:
        """Note a rank that has done its work."""
        self._beats.pop(rank, None)

    def latest(self, rank: int) -> Beat | None:
        return self._beats[rank][0] if rank in self._beats else None

    def verdict(self, now: float) -> Verdict | None:
        """Return the verdict, if there is one: causes before symptoms, symptoms before the mere lack of progress."""
        for failure, _ in self._failures.values():
            if not failure.symptom:
                return self._of_failure(failure)
        if self._died:
            rank, ended_at = self._died[0]
            beat, heard_at = self._beats[rank]
            return died_verdict(beat, ended_at - heard_at, self.stacks)
        for failure, since in self._failures.values():
            if now - since > self.patience_seconds:
                return self._of_symptom(failure, now)
        if self._awaited and now > self.hang_seconds:
            ranks = tuple(sorted(self._awaited))
            return Verdict("hung", ranks, absent_text(ranks, self.hang_seconds))
        beats = [beat for beat, _ in self._beats.values()]
        # Code of others may take long without progress; but whoever is alive sends signs of life all the time.
        if any(now - heard_at > self.hang_seconds for _, heard_at in self._beats.values()):
            return self._of_hang(beats, now)
        patience = max((beat.patience for beat in beats), default=1.0)
        if beats and now - self._progress_at > patience * self.hang_seconds:
            return self._of_hang(beats, now)
        return None

    def _of_failure(self, failure: Failure) -> Verdict:
        beat = self.latest(failure.rank)
        place = f" on {beat.host} failed in {beat}" if beat else " failed"
        text = f"rank {failure.rank}{place}: {failure.text}"
        if failure.code == 1:
            return Verdict("failed", (failure.rank,), f"{text} (its output has the traceback)")
        return Verdict("failed", (failure.rank,), text, failure.code)

    def _of_symptom(self, failure: Failure, now: float) -> Verdict:
        """Return the verdict on a symptom: a rank outside a timed-out collective is the cause, else the first."""
        others = [beat for beat, _ in self._beats.values() if beat.rank not in self._failures]
        if re.search(r"tim(ed|e)[ -]?out", failure.text, re.IGNORECASE) and not all(
            beat.waiting for beat in others
        ):
            return self._of_hang(others, now)
        return self._of_failure(failure)

    def _of_hang(self, beats: list[Beat], now: float) -> Verdict:
        ages = {beat.rank: now - self._beats[beat.rank][1] for beat in beats}
        silent = {rank for rank, age in ages.items() if age > self.hang_seconds / 2}
        ranks = blamed(beats, silent)
        beats = [beat._replace(seconds=beat.seconds + ages[beat.rank]) for beat in sorted(beats)]
        everyone = [beat for beat, _ in self._beats.values()]
        text = describe_hang([beat for beat in beats if beat.rank in ranks], everyone)
        if ranks[0] in silent:
            text += (
                f" Rank {ranks[0]} has sent no sign of life for {spoken(ages[ranks[0]])}: "
                "its process is stopped, or stuck in native code."
            )
        return Verdict("hung", ranks, f"{text} {what_to_do(self.stacks)}")


def describe_hang(guilty: Sequence[Beat], beats: Sequence[Beat]) -> str:
    """Return a sentence: which ranks are where for how long, and where the others wait."""
    first = guilty[0]
    for_long = f"{first} for {spoken(first.seconds)} (at {first.where})"
    if len(beats) == 1:
        return f"no progress: rank {first.rank} on {first.host} has been in {for_long}."
    if len(guilty) == len(beats):
        return (
            f"no rank makes progress, and none can be told to be the cause: rank {first.rank} on {first.host} "
            f"has been in {for_long}."
        )
    ranks = {beat.rank for beat in guilty}
    waits_in = Counter(beat.phase for beat in beats if beat.rank not in ranks).most_common(1)[0][0]
    if len(guilty) == 1:
        return (
            f"rank {first.rank} on {first.host} has been in {for_long} "
            f"while the others wait for it in `{waits_in}`."
        )
    shown = ", ".join(str(beat.rank) for beat in guilty[:8]) + (", ..." if len(guilty) > 8 else "")
    return (
        f"{len(guilty)} ranks ({shown}; the first on {first.host}) have been in {for_long} "
        f"while the others wait for them in `{waits_in}`."
    )


def absent_text(ranks: Sequence[int], seconds: float) -> str:
    """Return a sentence about ranks that did not come."""
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    named = f"rank {shown} has" if len(ranks) == 1 else f"ranks {shown} have"
    return (
        f"{named} not come within {spoken(seconds)}: not started, ended or stopped before the ranks could meet, or "
        "unable to reach rank 0. What was printed there says why. Start again once that is mended."
    )


def died_verdict(beat: Beat, age: float, stacks: Path | None) -> Verdict:
    """Return the verdict on a rank whose connection ended without a word, `age` seconds after it was last heard of."""
    return Verdict(
        "died",
        (beat.rank,),
        f"rank {beat.rank} on {beat.host} died without a word, {spoken(age)} after it was heard of in {beat}: killed "
        "(out of memory?), crashed in native code, or its node or its network was lost. "
        f"{what_to_do(stacks)}",
    )


def what_to_do(stacks: Path | None) -> str:
    """Return the end of a message: where the stacks are, and how the run goes on."""
    where = f"Stacks of the ranks that could still write them are in {stacks}/. " if stacks else ""
    return f"{where}The same command resumes from the newest checkpoint."


def spoken(seconds: float) -> str:
    """Return a duration in words for people."""
    return f"{seconds:.1f} seconds" if seconds < 120 else f"{seconds / 60:.1f} minutes"


WAITING_FILES = (
    "/torch/distributed/",
    "/deepspeed/comm/",
    "/deepspeed/utils/nvtx.py",
    "/torch/utils/file_baton.py",
)
"""Files that hold the innermost Python frame while a rank waits for others; the last, while one builds operators."""


def look(leave_out: Container[int | None]) -> tuple[str, bool]:
    """Return where the main thread is, and whether any thread waits for other ranks (a backward pass has its own)."""
    where, waiting = "nowhere", False
    for ident, frame in sys._current_frames().items():
        code = frame.f_code
        if ident == threading.main_thread().ident:
            where = f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"
        waiting |= ident not in leave_out and is_waiting(frame)
    return where, waiting


def is_waiting(frame: FrameType) -> bool:
    """Return True where a thread whose innermost Python frame is this one waits for other ranks."""
    file = frame.f_code.co_filename
    if frame.f_code.co_name == "<module>":
        return False  # it is being imported
    if any(part in file for part in WAITING_FILES):
        return True
    if "/deepspeed/" not in file:
        return False
    # DeepSpeed waits for its handles wherever it needs them; what else it does there is work. Which function it calls
    # is told by the code of its frame: reading its source might block.
    names = [
        step.argval
        for step in dis.get_instructions(frame.f_code)
        if step.offset <= frame.f_lasti and step.opname in ("LOAD_METHOD", "LOAD_ATTR")
    ]
    return names[-1:] == ["wait"]
