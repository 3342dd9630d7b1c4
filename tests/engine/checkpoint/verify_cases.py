"""Two ranks look for the newest intact step together, for test_verify."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pal_ds.distributed.world import World
from pal_ds.engine.checkpoint import verify
from pal_ds.engine.checkpoint.verify import newest_intact_for_all
from pal_ds.engine.process_group import distributed
from pal_ds.errors import StorageError, UserError
from pal_ds.runs.run_dir import RunDirectory
from tests.cli.test_trust import Evil, replaced
from tests.engine.kills import said
from tests.engine.newest import newest_intact
from tests.engine.steps import SHARDS, make_step, of_format
from tests.warm import fork_ranks, wait_for

NUM_RANKS = 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damages(run: RunDirectory) -> Iterator[tuple[str, Callable[[], object]]]:
    """What may be wrong with the newest of three steps, by name."""
    newest = run.checkpoint(3)
    yield "nothing", lambda: None
    for name in ("users.arrow", *(f"engine/{name}" for name in SHARDS)):
        yield f"flipped {name}", lambda name=name: flip(newest / name)
        yield f"deleted {name}", (newest / name).unlink
    yield "all flipped", lambda: [flip(newest / "engine" / name) for name in SHARDS]
    yield "two steps flipped", lambda: [flip(run.checkpoint(n) / "users.arrow") for n in (2, 3)]
    yield "no manifest", (newest / "manifest.json").unlink
    yield "newer format", lambda: of_format(newest, 99)
    yield "anyone may write", lambda: (newest / "users.arrow").chmod(0o666)
    shard = "engine/b_model_states.pt"
    yield "foreign code", lambda: replaced(newest, shard, {"x": Evil(Path("/nowhere"))})
    yield (
        "cut off in a replacement",
        lambda: newest.rename(newest.with_name(newest.name + ".replaced")),
    )
    yield (
        "nothing intact",
        lambda: [(run.checkpoint(n) / "manifest.json").unlink() for n in run.all_steps()],
    )


class Told(logging.Handler):
    """What was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def outcome_of(find: Callable[[], Any]) -> list[Any]:
    """The step that was found or what was raised, and what was said on the way."""
    told = Told()
    verify.logger.addHandler(told)
    try:
        found = find()
        return [str(found and found[0]), found and found[1], told.lines]
    except UserError as error:
        return [type(error).__name__, str(error), told.lines]
    finally:
        verify.logger.removeHandler(told)


def look(world: World, folder: Path) -> dict[str, Any]:
    """Each damage as one process and as all ranks see it; the files that this rank has read of an intact step."""
    seen: dict[str, Any] = {}
    names = [name for name, _ in damages(RunDirectory(folder))]
    for name in names:
        run = RunDirectory(folder / name.replace("/", "_"))

        def prepare(run: RunDirectory = run, name: str = name) -> None:
            for step in (1, 2, 3):
                make_step(run, step)
            dict(damages(run))[name]()

        world.from_rank_zero(prepare)
        together = outcome_of(lambda run=run: newest_intact_for_all(run, world))
        seen[name] = [outcome_of(lambda run=run: newest_intact(run)), together]
    run, read = RunDirectory(folder / "nothing"), []
    hash_file = verify.hash_file
    verify.hash_file = lambda path: read.append(path.name) or hash_file(path)
    newest_intact_for_all(run, world)
    verify.hash_file = hash_file
    world.barrier()
    if world.rank == 1:
        verify.wait_for_files = not_seen
    return {
        "seen": seen,
        "read": read,
        "unseen": outcome_of(lambda: newest_intact_for_all(run, world)),
    }


def not_seen(path: Path, entries: dict[str, Any]) -> None:
    raise StorageError(f"{path}: not seen")


def together(folder: str) -> list[dict[str, Any]]:
    """What each rank found."""

    def work() -> None:
        torch.set_num_threads(1)
        with distributed() as world:
            found = look(world, Path(folder))
            (Path(folder) / f"found_{world.rank}.json").write_text(json.dumps(found))

    codes = wait_for(fork_ranks(NUM_RANKS, work, Path(folder) / "log"), seconds=60)
    assert codes == [0] * NUM_RANKS, said(Path(folder) / "log")
    return [json.loads((Path(folder) / f"found_{n}.json").read_text()) for n in range(NUM_RANKS)]
