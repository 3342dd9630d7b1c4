"""The newest intact checkpoint, found by all ranks together: one alone would hash for longer than the others wait."""

import time
from pathlib import Path

from pal_ds.distributed import phase
from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint.manifest import Manifest, check_content, check_listing, first_intact
from pal_ds.engine.checkpoint.retention import restore_replaced
from pal_ds.engine.checkpoint.shard_writer import FileEntry
from pal_ds.errors import StorageError, UserError
from pal_ds.runs.run_dir import RunDirectory

SECONDS_TO_APPEAR = 60
"""A network file system may show one node's files to another with this delay."""


def newest_intact_for_all(
    run: RunDirectory, world: World, *, trust: bool = False
) -> tuple[Path, Manifest] | None:
    """Return what `manifest.newest_intact` returns, on every rank; each of them reads its share of the files.

    Rank 0 chooses the step and looks at its listing; damage that any rank finds sends all to the step before.

    Raises:
        StorageError: a rank cannot read a file, or does not see what rank 0 sees.
        UserError: as `newest_intact`, on every rank alike.
    """

    def choose() -> list[int]:
        restore_replaced(run)
        return run.all_steps()

    def verify(path: Path) -> Manifest:
        phase.enter("verify a checkpoint")
        manifest = world.from_rank_zero(lambda: check_listing(path, trust=trust))
        mine = share_of(manifest["files"], world.rank, world.world_size)
        own_problem = world.on_every_rank(lambda: _first_problem(path, mine))
        problems = [problem for problem in world.gather(own_problem) if problem is not None]
        if problems:
            # The one that a process alone would have come to first.
            raise min(problems, key=lambda problem: problem[0])[1]
        return manifest

    return first_intact(run, world.from_rank_zero(choose), verify)


def share_of(
    files: dict[str, FileEntry], rank: int, world_size: int
) -> dict[int, tuple[str, FileEntry]]:
    """Return the files that a rank reads, the largest dealt out first, under their places in the manifest.

    >>> files = {name: {"size": size, "xxh3_128": ""} for name, size in (("a", 1), ("b", 9), ("c", 5))}
    >>> [[name for name, _ in share_of(files, rank, world_size=2).values()] for rank in (0, 1)]
    [['a', 'b'], ['c']]
    """
    listed = list(enumerate(files.items()))
    dealt = sorted(listed, key=lambda item: -item[1][1]["size"])[rank::world_size]
    return dict(sorted(dealt))


def _first_problem(
    path: Path, share: dict[int, tuple[str, FileEntry]]
) -> tuple[int, UserError] | None:
    wait_for_files(path, dict(share.values()))
    for place, (name, entry) in share.items():
        try:
            check_content(path / name, entry)
        except UserError as error:
            return place, error
    return None


def wait_for_files(directory: Path, entries: dict[str, FileEntry]) -> None:
    """Wait until this node sees files that another rank wrote or has seen.

    Raises:
        StorageError: it never does, as where every node has a disk of its own under this name.
    """
    deadline = time.monotonic() + SECONDS_TO_APPEAR
    for name, entry in entries.items():
        path = directory / name
        while not (path.is_file() and path.stat().st_size == entry["size"]):
            if time.monotonic() > deadline:
                raise StorageError(
                    f"{path}: another rank has it, and this one does not see it whole. --run_dir must lie on a file "
                    "system that all nodes share."
                )
            phase.progress()  # this wait has its own end
            time.sleep(0.1)
