"""Where the ranks of a launch meet: torch's store, and a watch from the first moment over who comes and who does not.

The ranks' process group may be made an hour later, when rank 0 has prepared the data; until then nothing but this
watch tells that a rank hangs or has died.
"""

import contextlib
import datetime
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as torch_dist

from pal_ds.distributed.watchdog import watch_from_the_start
from pal_ds.distributed.watchdog.ending import within
from pal_ds.distributed.watchdog.link import AwakeClock
from pal_ds.distributed.world import World, leave
from pal_ds.errors import LauncherError, RankLostError, storage_error

logger = logging.getLogger(__name__)

_stores: list[torch_dist.Store] = []
"""Where the ranks met first, and again for each later group of this process, under a prefix of its own."""


@contextlib.contextmanager
def met(timeout: datetime.timedelta, hang_minutes: float) -> Iterator[torch_dist.Store]:
    """Yield the store of a launcher's ranks, who are watched in the block where `hang_minutes` is not 0.

    Raises:
        LauncherError: another program listens at MASTER_PORT of this machine.
        RankLostError: rank 0 does not answer, or one of them hangs, dies or fails; see `watch`.
    """
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    if not hang_minutes or world_size == 1:
        yield _store(rank, timeout)
        return
    limit = datetime.timedelta(minutes=hang_minutes)
    arrived = threading.Event()
    threading.Thread(target=_end_unless, args=(arrived, limit, rank), daemon=True).start()
    store = _store(rank, limit)
    world = World(rank, world_size, torch.device("cpu"))
    with watch_from_the_start(world, 60 * hang_minutes, store):
        arrived.set()
        store.set_timeout(timeout)
        yield store


def _store(rank: int, timeout: datetime.timedelta) -> torch_dist.Store:
    if not _stores:
        _stores.append(_first_store(rank, timeout))
        return _stores[0]
    # Keys of the group that came to its end are still there.
    _stores.append(torch_dist.PrefixStore(f"pal_ds_{len(_stores)}", _stores[0]))
    return _stores[-1]


def _first_store(rank: int, timeout: datetime.timedelta) -> torch_dist.Store:
    """Connect to the store that torchrun's agent holds, or to rank 0's, who waits for nobody here."""
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        if not holds:
            _wait_for_listener((host, int(port)), timeout.total_seconds())
        return torch_dist.TCPStore(
            host,
            int(port),
            is_master=holds,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except (torch_dist.DistError, OSError) as error:
        if holds and "EADDRINUSE" in str(error):
            raise LauncherError(
                f"MASTER_PORT {port}: another program listens there on this machine, so the ranks cannot meet at "
                f"{host}:{port}. Set another port, or end that program (a launch of before?)."
            ) from None
        if (refused := storage_error(error)) is not None:
            raise refused from error
        lost = RankLostError(_not_met(timeout))
        if _speaks(rank):
            logger.error("rank %d: %s", rank, lost)
        raise lost from error


def _wait_for_listener(address: tuple[str, int], seconds: float) -> None:
    """Wait until somebody listens there: torch tells of its own tries in a page each. Raises OSError at the end."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(address, timeout=seconds).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _not_met(limit: datetime.timedelta) -> str:
    return (
        f"the ranks could not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, "
        f"MASTER_PORT) within {limit.total_seconds():g} seconds: rank 0 did not start, hangs, or cannot be reached "
        "there, or another program answers. What rank 0 printed says why. Start again once that is mended."
    )


def _speaks(rank: int) -> bool:
    """Return True on one rank of each node, for what rank 0 cannot say."""
    return rank != 0 and (rank == 1 or os.environ.get("LOCAL_RANK") == "0")


def _end_unless(arrived: threading.Event, limit: datetime.timedelta, rank: int) -> None:
    """End this process where it has not met rank 0 within the limit, wherever its main thread is stuck."""
    clock = AwakeClock(2.0)
    while not arrived.wait(1.0):
        clock.tick()
        if clock.now > limit.total_seconds() + 1:
            if _speaks(rank):
                within(1, lambda: logger.error("rank %d: %s", rank, _not_met(limit)))
            within(1, lambda: leave(RankLostError.exit_code))
            os._exit(RankLostError.exit_code)
