"""Keepers of encoded states: in the memory of every rank, or on disk in shards that all of them map into memory.

There is no lock on disk: a shard is named by its content and appears whole, by a rename, so any number of processes may
fill one cache. Two at once may both encode a text; that costs time and room, and nothing else.
"""

import contextlib
import logging
import tempfile
import time
from importlib.metadata import version

import numpy as np
import torch
from torch import Tensor

from pal_ds.data.features import FeatureStore, MappedFeatures
from pal_ds.distributed import phase
from pal_ds.distributed.world import World
from pal_ds.errors import StorageError, UserError, writing
from pal_ds.feature_cache.folders import CacheFolder
from pal_ds.feature_cache.shards import (
    SUFFIX,
    DamagedShardError,
    FeatureIndex,
    Shard,
    first_of_each,
    pack_shard,
    shard_name,
    verify_once,
    verify_shard,
)
from pal_ds.io.fault_points import reached
from pal_ds.io.files import replacing, write_json

logger = logging.getLogger(__name__)

SHARD_BYTES = 1 << 28
SHARD_SECONDS = 300.0
"""A shard is written when it holds so much, or so much time's work: a kill loses no more than that of each rank."""
STALE_SECONDS = 3600.0
"""No shard takes so long to be written: a file under its temporary name that is older was left by a killed process."""


class Keeper:
    """Takes states [n_i, H] row by row; `begin`, `settle`, `flush` and `finish` are called on all ranks in step."""

    def begin(self, rows: np.ndarray, addresses: np.ndarray | None) -> np.ndarray:
        """The rows among `rows` (sorted) whose states it lacks, the same on every rank."""
        raise NotImplementedError

    def take(self, row: int, states: Tensor) -> None:
        """States of a row that this rank has encoded."""
        raise NotImplementedError

    def settle(self) -> None:
        """Called after each forward. Raises on all ranks what went wrong on any."""

    def flush(self) -> None:
        """Make what was taken outlive this process, if it ever will."""

    def finish(self) -> None:
        """All that was lacking has been taken, on some rank."""
        raise NotImplementedError

    def store(self, num_rows: int) -> MappedFeatures | None:
        """The states of the rows of `begin` for a table of `num_rows`; None where there are none."""
        raise NotImplementedError


class MemoryKeeper(Keeper):
    """Keeps the states of all ranks in the memory of each of them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._rows = np.empty(0, np.int64)
        self._taken: dict[int, Tensor] = {}

    def begin(self, rows: np.ndarray, addresses: np.ndarray | None) -> np.ndarray:
        self._rows = rows
        return rows

    def take(self, row: int, states: Tensor) -> None:
        self._taken[row] = states

    def finish(self) -> None:
        parts = self._world.gather(self._taken)
        self._taken = {row: states for part in parts for row, states in part.items()}

    def store(self, num_rows: int) -> FeatureStore | None:
        if len(self._rows) == 0:
            return None
        states = [self._taken[row] for row in self._rows.tolist()]
        lengths = np.zeros(num_rows, np.int64)
        lengths[self._rows] = [len(state) for state in states]
        return FeatureStore(torch.cat(states), np.concatenate([[0], np.cumsum(lengths)]))


class CacheKeeper(Keeper):
    """Keeps states in a `CacheFolder`, and knows those that are there already.

    A damaged shard is named and passed over: its texts are encoded anew, and then it is deleted.
    """

    def __init__(self, folder: CacheFolder, world: World) -> None:
        self._folder, self._world = folder, world
        self._open_shards: dict[str, Shard] = {}
        self._damaged: list[str] = []
        self._index = FeatureIndex([])
        self._addresses = np.empty((0, 2), np.uint64)
        self._rows = np.empty(0, np.int64)
        self._lacking: dict[int, bytes] = {}
        self._pending: list[tuple[bytes, Tensor]] = []
        self._pending_bytes, self._pending_since = 0, time.monotonic()
        self._written: list[str] = []
        self._problem: StorageError | None = None

    def begin(self, rows: np.ndarray, addresses: np.ndarray | None) -> np.ndarray:
        """Opens the shards there are; raises UserError where a rank cannot see what another sees."""
        assert addresses is not None
        self._rows, self._addresses = rows, addresses
        # On rank 0, as directories may look different elsewhere for a while.
        names = self._world.from_rank_zero(
            lambda: sorted(path.name for path in self._folder.path.glob(f"*{SUFFIX}"))
        )
        self._damaged, gone = self._find_damaged(names)
        unusable = {*self._damaged, *gone}
        self._map([name for name in names if name not in unusable])
        missing = np.flatnonzero(self._index.find(addresses) < 0)
        missing = np.sort(missing[first_of_each(addresses[missing])])
        self._lacking = {
            row: address.tobytes()
            for row, address in zip(rows[missing].tolist(), addresses[missing], strict=True)
        }
        if len(missing):
            self._world.from_rank_zero(self._make_folder)
        self._pending_since = time.monotonic()
        if self._world.is_rank_zero:
            logger.info(
                "%s: %d texts are here, %d of the %d that are read have to be encoded",
                self._folder.path,
                len(self._index),
                len(missing),
                len(first_of_each(addresses)),
            )
        return rows[missing]

    def take(self, row: int, states: Tensor) -> None:
        # A text may be encoded for another keeper's sake.
        if row in self._lacking:
            self._pending.append((self._lacking[row], states))
            self._pending_bytes += states.numel() * states.element_size()

    def settle(self) -> None:
        waited = time.monotonic() - self._pending_since
        if self._pending_bytes >= SHARD_BYTES or waited >= SHARD_SECONDS:
            try:
                self._write()
            except StorageError as error:
                self._problem = error
        if self._world.any_rank(self._problem is not None)[0]:
            self._world.on_every_rank(self._raise_problem)

    def flush(self) -> None:
        self._world.on_every_rank(self._write)

    def finish(self) -> None:
        self.flush()
        names = sorted(name for part in self._world.gather(self._written) for name in part)
        self._map(names)
        if self._damaged:
            self._world.from_rank_zero(self._delete_damaged)

    def store(self, num_rows: int) -> MappedFeatures | None:
        if len(self._rows) == 0:
            return None
        entries = self._index.find(self._addresses)
        assert (entries >= 0).all(), f"{self._folder.path}: a text was not encoded"
        return self._index.store(entries, self._rows, num_rows)

    def _make_folder(self) -> None:
        path = self._folder.path
        with writing(path):
            path.mkdir(parents=True, exist_ok=True)
            # Before hours of work: whether shards can be written here.
            tempfile.TemporaryFile(dir=path).close()
            for stale in path.glob(f"*{SUFFIX}.tmp-*"):
                # Another filler may be at work on a young one.
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - stale.lstat().st_mtime > STALE_SECONDS:
                        stale.unlink()
        if not (path / "cache.json").is_file():
            facts = {"key": self._folder.key, "made_from": self._folder.made_from}
            packages = {name: version(name) for name in ("torch", "transformers")}
            write_json(path / "cache.json", {**facts, "first_written_with": packages})

    def _find_damaged(self, names: list[str]) -> tuple[list[str], list[str]]:
        """(damaged shards, which are named; shards that another process has deleted since); each read on one rank."""
        phase.enter("verify the feature cache")

        def verify() -> list[tuple[str, str]]:
            problems = []
            for name in names[self._world.rank :: self._world.world_size]:
                try:
                    verify_once(self._folder.path / name, phase.progress)
                except DamagedShardError as error:
                    problems.append((name, str(error)))
                except FileNotFoundError:
                    problems.append((name, ""))
            return problems

        damaged = self._world.gather(self._world.on_every_rank(verify))
        problems = [problem for part in damaged for problem in part]
        if self._world.is_rank_zero:
            for _, problem in problems:
                if problem:
                    logger.warning("%s: passing over it and encoding its texts anew", problem)
        gone = self._world.from_rank_zero(lambda: self._gone(problems))
        return [name for name, problem in problems if problem], gone

    def _gone(self, problems: list[tuple[str, str]]) -> list[str]:
        """Shards that some rank did not find, if rank 0 does not see them any more, either. Raises UserError else."""
        names = [name for name, problem in problems if not problem]
        for name in names:
            if (self._folder.path / name).exists():
                raise self._unshared(name)
        return names

    def _map(self, names: list[str]) -> None:
        """Opens shards on every rank; those of another key are passed over."""

        def open_shards() -> None:
            for name in names:
                try:
                    shard = Shard.map(self._folder.path / name)
                except FileNotFoundError:
                    raise self._unshared(name) from None
                if shard.key == self._folder.key:
                    self._open_shards[name] = shard
                else:
                    logger.warning(
                        "%s: of another backbone or reading (key %s); passing over it",
                        self._folder.path / name,
                        shard.key,
                    )

        self._world.on_every_rank(open_shards)
        self._index = FeatureIndex(list(self._open_shards.values()))

    def _unshared(self, name: str) -> UserError:
        return UserError(
            f"{self._folder.path / name}: not found, though another rank sees it. backbone.cache must lie on a file "
            "system that all nodes share."
        )

    def _write(self) -> None:
        """Write a shard of what was taken. Raises StorageError."""
        self._pending_since = time.monotonic()
        if not self._pending:
            return
        reached("shard begins")
        addresses, states = zip(*self._pending, strict=True)
        content = pack_shard(self._folder.key, list(addresses), list(states))
        path = self._folder.path / shard_name(content)
        half = len(content) // 2
        with writing(path), replacing(path) as temporary:
            with open(temporary, "wb") as stream:
                stream.write(content[:half])
                stream.flush()
                reached("inside a state shard")
                stream.write(content[half:])
            reached("state shard written")
        self._written.append(path.name)
        self._pending, self._pending_bytes = [], 0
        reached("shard renamed")
        phase.progress()

    def _raise_problem(self) -> None:
        if self._problem is not None:
            raise self._problem

    def _delete_damaged(self) -> None:
        """Unless they were written again: a shard is named by its content, so what heals one has its name."""
        with writing(self._folder.path):
            for name in self._damaged:
                path = self._folder.path / name
                try:
                    verify_shard(path, phase.progress)
                except DamagedShardError:
                    path.unlink(missing_ok=True)
                except FileNotFoundError:
                    continue
