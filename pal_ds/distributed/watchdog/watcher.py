"""The watchdog of a rank: what the rank is doing, and how it ends."""

import contextlib
import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch.distributed import Store

from pal_ds.distributed import phase
from pal_ds.distributed.interrupts import before_a_sudden_end
from pal_ds.distributed.watchdog.coordinator import Coordinator
from pal_ds.distributed.watchdog.ending import forget, own_stderr, record, within
from pal_ds.distributed.watchdog.heartbeat import Beat, Failure, Ledger, Verdict, look
from pal_ds.distributed.watchdog.link import Link
from pal_ds.distributed.watchdog.lost_ranks import (
    exit_code_of,
    is_symptom,
    meeting,
    one_line,
    watches,
)
from pal_ds.distributed.world import World, leave
from pal_ds.errors import RankLostError, UserError

logger = logging.getLogger(__name__)

SECONDS_TO_WRITE_STACKS = 10
"""A file system that no longer answers, which may be why the rank hangs, must not keep it alive."""
SECONDS_TO_LEAVE = 30
"""A rank that raised may hang once more while it tidies up after peers that are gone."""
_STORE_KEY = "pal_ds watchdog"


@contextlib.contextmanager
def watch(
    world: World,
    stacks: Path,
    hang_minutes: float,
    on_loss: Callable[[str], None] = lambda _: None,
) -> Iterator[None]:
    """Let no rank, inside the block, wait for ever for one that hangs (`hang_minutes` without progress), dies or fails.

    Every rank must enter alike; 0 minutes is no watch at all. `on_loss` is called on one rank, with the reason of an
    end that came from another rank, or seems to.

    Raises:
        RankLostError: another rank failed or died, where this one would have raised what it saw of that.
    """
    watcher = next((one for one in watches if isinstance(one, Watcher)), None)
    if watcher is None and not hang_minutes:
        try:
            yield
        except Exception as error:
            if world.is_rank_zero and is_symptom(error):
                record(on_loss, one_line(error))
            raise
        return
    with contextlib.ExitStack() as held:
        is_own = watcher is None
        if watcher is None:
            watcher = Watcher(world, 60 * hang_minutes)
            held.callback(watcher.close)
        watcher.tell(stacks, on_loss)
        with _sharing(watcher):
            if is_own:
                watcher.start()
            yield
            phase.enter("wait for the others at the end")
            world.barrier()
        watcher.tell(None)


@contextlib.contextmanager
def watch_from_the_start(world: World, hang_seconds: float, store: Store) -> Iterator[None]:
    """Let no rank wait for ever, as `watch` does, from before they are a group; they meet at torch's `store`.

    A rank that has not come after `hang_seconds` is lost. Each `watch` inside the block is this one, and says where
    stacks go and who is told.

    Raises:
        RankLostError: another rank did not come, failed or died, where this one would have raised what it saw of that.
    """
    watcher = Watcher(world, hang_seconds)
    watches.append(watcher)

    def tell_of_interrupt() -> None:
        watcher.cause_of(KeyboardInterrupt())

    before_a_sudden_end.append(tell_of_interrupt)
    try:
        with _sharing(watcher):
            watcher.start_at(store)
            yield
    finally:
        before_a_sudden_end.remove(tell_of_interrupt)
        watches.remove(watcher)
        watcher.close()


@contextlib.contextmanager
def _sharing(watcher: "Watcher") -> Iterator[None]:
    """Tell the other ranks of what is raised in the block, once; raises its cause where that is another rank."""
    try:
        yield
    except BaseException as error:
        cause = None if watcher.is_told else watcher.cause_of(error)
        if cause is not None:
            raise cause from error
        raise


class Watcher:
    """The watchdog of this rank."""

    def __init__(self, world: World, hang_seconds: float) -> None:
        self.world, self.hang_seconds = world, hang_seconds
        self.stacks: Path | None = None
        self.on_loss = forget
        self.is_told = False
        """True once the others were told what this rank raised."""
        self.interval = min(max(1.0, world.world_size / 200), hang_seconds / 6)
        """Seconds between two heartbeats; rank 0 hears 200 of them in a second at most, for 1% of a core."""
        self.patience = max(2 * self.interval, 1.0)
        """Seconds of waiting for a cause after a symptom, or for other ranks to raise the same by themselves."""
        self.verdict: Verdict | None = None
        self._known, self._main_leaves = threading.Event(), threading.Event()
        self._written = threading.Event()
        self._lock, self._thread_ends = threading.Lock(), False
        self._host, self._stderr = socket.gethostname(), own_stderr()
        self._line: Coordinator | Link | None = None
        self._thread: threading.Thread | None = None

    def tell(self, stacks: Path | None, on_loss: Callable[[str], None] = forget) -> None:
        """Say where the stacks of a lost run go, and who is told of the loss."""
        self.stacks, self.on_loss = stacks, on_loss
        if self._line is not None:
            self._line.stacks = stacks

    def start_at(self, store: Store) -> None:
        """Connect the ranks by what rank 0 writes to torch's `store`; rank 0 waits for nobody."""
        if self.world.is_rank_zero:
            everyone = range(1, self.world.world_size)
            store.set(_STORE_KEY, json.dumps(self._open_hub(everyone)))
        else:
            self._connect(*json.loads(store.get(_STORE_KEY)))

    def start(self) -> None:
        """Connect the ranks. Raises UserError on all of them where one cannot be reached."""
        with meeting():
            address = self.world.from_rank_zero(self._open_hub)
            self.world.on_every_rank(lambda: self._connect(*address))

    def _open_hub(self, awaited: Iterable[int] = ()) -> tuple[int, str]:
        ledger = Ledger(self.hang_seconds, self.patience, self.stacks, awaited)
        coordinator = Coordinator(
            self.world.world_size, ledger, self.interval, self.beat, self.learn
        )
        self._run(coordinator)
        return coordinator.port, coordinator.token

    def _connect(self, port: int, token: str) -> None:
        if self.world.is_rank_zero:
            return
        address = (os.environ["MASTER_ADDR"], port)
        # Rank 0 judges first; this is for a rank 0 that cannot.
        silence = self.hang_seconds + 4 * self.patience
        places = (self.interval, silence, self.stacks)
        try:
            link = Link(address, token, *places, self.beat, self.learn)
        except OSError as error:
            raise UserError(
                f"{self._host} cannot reach the watchdog of rank 0 at {address[0]}:{port} ({error}). Let ranks connect "
                "to each other on any port, or set train.hang_minutes=0 to do without."
            ) from None
        self._run(link)

    def _run(self, line: Coordinator | Link) -> None:
        self._line = line
        self._thread = threading.Thread(target=line.run, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> Beat:
        """Return what this rank is doing now; its watchdog thread calls this at every heartbeat."""
        now = phase.current()
        own = (threading.get_ident(), self._thread.ident if self._thread else None)
        where, waiting = look(own)
        if self._stderr is not None:
            # Its timer runs even where native code keeps the interpreter to itself.
            faulthandler.dump_traceback_later(self.hang_seconds, file=self._stderr)
        place = (now.name, now.step, time.monotonic() - now.since)
        counts = (now.num_entered, now.num_in_step)
        return Beat(self.world.rank, self._host, *place, *counts, where, waiting, now.patience)

    def learn(self, verdict: Verdict) -> None:
        """Take the verdict from the watchdog thread, once; returns at once, and the process ends a little later."""
        self.verdict = verdict
        with self._lock:
            # Else the main thread may be about to raise the same, with its own exit code and message.
            if not verdict.may_be_shared:
                self._thread_ends = not self._main_leaves.is_set()
        if not verdict.may_be_shared:
            self._say(verdict)
        self._known.set()
        threading.Thread(target=self._end, args=(verdict,), name="end", daemon=True).start()

    def _say(self, verdict: Verdict) -> None:
        rank, kind = self.world.rank, verdict.kind
        concerned = rank in verdict.ranks or (kind == "died" and 0 in verdict.ranks)
        # A rank that failed raises, with its own message or traceback.
        raises = kind == "failed" and rank in verdict.ranks
        if (rank == 0 or concerned) and not raises:
            with contextlib.suppress(OSError):  # its terminal was closed, and the end must go on
                stream = self._stderr or sys.__stderr__
                print(f"pal-ds: error: {verdict.text}", file=stream, flush=True)

    def _end(self, verdict: Verdict) -> None:
        """Write stacks, let the others hear, and end the process unless the main thread does."""
        if verdict.kind != "failed":
            within(SECONDS_TO_WRITE_STACKS, lambda: self._write_stacks(verdict))
        self._written.set()
        if verdict.may_be_shared:
            self._main_leaves.wait(self.patience)
            with self._lock:
                self._thread_ends = not self._main_leaves.is_set()
            if self._thread_ends:
                self._say(verdict)
        if not self._thread_ends:
            return
        within(SECONDS_TO_WRITE_STACKS, lambda: self._record(verdict.text, verdict))
        assert self._line is not None
        self._line.wait_for_verdict(self.patience)
        within(SECONDS_TO_WRITE_STACKS, lambda: leave(verdict.code))
        os._exit(verdict.code)

    def _write_stacks(self, verdict: Verdict) -> None:
        if self.stacks is None:
            return
        self.stacks.mkdir(parents=True, exist_ok=True)
        with open(self.stacks / f"rank_{self.world.rank}.txt", "w") as stream:
            stream.write(f"{time.strftime('%F %T')} {verdict.text}\n{self.beat()}\n\n")
            stream.flush()
            faulthandler.dump_traceback(stream, all_threads=True)

    def _record(self, reason: str, verdict: Verdict | None) -> None:
        """Record the loss on a single rank: on rank 0, or on the next where rank 0 died."""
        if self.world.rank == int(verdict is not None and verdict[:2] == ("died", (0,))):
            record(self.on_loss, reason)

    def cause_of(self, error: BaseException) -> RankLostError | None:
        """Tell the others of `error`; return what to raise instead, where it came of another rank's end."""
        code = exit_code_of(error)
        if code == 0 or self._line is None:
            return None
        self.is_told = True
        with self._lock:
            self._main_leaves.set()
        if self._thread_ends:
            threading.Event().wait()  # the end of the process is under way
        symptom = is_symptom(error)
        self._line.report(Failure(self.world.rank, one_line(error), code, symptom))
        # A bit longer than rank 0 waits for a cause; where this is the cause, it is known at once.
        self._known.wait(2 * self.patience + self.interval)
        verdict = self.verdict
        if verdict is not None:
            self._written.wait(SECONDS_TO_WRITE_STACKS)
        if self.world.world_size > 1:
            self._line.wait_for_verdict(self.patience)
            timer = threading.Timer(SECONDS_TO_LEAVE, os._exit, (code,))
            timer.daemon = True
            timer.start()
        if not symptom:
            return None
        cause = None if verdict is None or self.world.rank in verdict.ranks else verdict
        self._record(cause.text if cause else one_line(error), cause)
        if cause is None:
            return None
        lost = RankLostError(cause.text)
        # What one rank could not do, and a person can mend, ends the whole job with that code.
        lost.exit_code, lost.is_printed = cause.code, not cause.may_be_shared
        return lost

    def close(self) -> None:
        """End the watch, because the work is done or the process is about to end."""
        faulthandler.cancel_dump_traceback_later()
        if self._line is not None and self._thread is not None:
            self._line.close()
            self._thread.join(self.interval)
        opened, self._stderr = self._stderr, None
        if opened is not None:
            opened.close()
