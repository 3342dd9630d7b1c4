"""Rewrites a checkpoint for another number of ranks, as if they had written it: for a job that is to start at once.

python tools/reshard.py RUN --world_size W [--step N|latest|best] [--trust_checkpoint]

`train` does the same by itself when it resumes on another number of ranks, so this is never needed. The step keeps its
number and its place in RUN; the old one stays until the new one is whole on the disk. Weights, moments, step counts,
buffers and users keep every bit, so going back is this again with the old W. One process, no GPU; memory is one shard.
"""

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pal_ds.errors import UserError, end_with, writing

if TYPE_CHECKING:
    from pal_ds.runs.run_dir import RunDirectory


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Rewrite a checkpoint for another number of ranks.", allow_abbrev=False
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory that `train` wrote")
    parser.add_argument("--world_size", type=int, required=True, metavar="W", help="ranks to come")
    parser.add_argument("--step", default="latest", help="a number, latest or best")
    parser.add_argument(
        "--trust_checkpoint", action="store_true", help="read checkpoints of another owner"
    )
    return parser


def reshard(run_dir: Path, world_size: int, step: str, *, trust: bool) -> str:
    """Exchanges a step of a run for its resharded self; says what was done.

    Raises:
        StorageError: the new step cannot be written; the old one is as it was.
        UserError: no such run or step, a damaged checkpoint, or no number of ranks.
    """
    from pal_ds.runs.lock import only_writer
    from pal_ds.runs.run_dir import RunDirectory

    if world_size < 1:
        raise UserError(f"--world_size is {world_size}; it must be at least 1.")
    run = RunDirectory(run_dir)
    run.require_run()
    with only_writer(run):
        return exchange(run, world_size, step, trust=trust)


def exchange(run: "RunDirectory", world_size: int, step: str, *, trust: bool) -> str:
    """`reshard`, of a run that nobody else writes to."""
    from pal_ds.engine.checkpoint.forget import EDITED, OLD, recover
    from pal_ds.engine.checkpoint.manifest import verify_checkpoint
    from pal_ds.engine.checkpoint.reshard import write_resharded
    from pal_ds.io.files import sync_to_disk
    from pal_ds.progress import progress_bar

    # Gives a step its name back that an interrupted exchange, of this tool or of `users`, left under another.
    recover(run)
    path = run.checkpoint(run.resolve_step(step))
    manifest = verify_checkpoint(path, trust=trust)
    if manifest["world_size"] == world_size:
        return f"{path}: has world size {world_size} already"
    edited, old = path.with_name(EDITED + path.name), path.with_name(OLD + path.name)
    with progress_bar("resharding", world_size, shown=sys.stderr.isatty(), unit="bytes") as advance:
        for num_bytes in write_resharded(path, edited, manifest, world_size):
            advance(num_bytes)
    with writing(path):
        path.rename(old)
        edited.rename(path)
        sync_to_disk(path.parent)
        shutil.rmtree(old)
    return f"{path}: resharded from world size {manifest['world_size']} to {world_size}"


def main(arguments: list[str] | None = None) -> None:
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # DeepSpeed is imported for its defaults alone, and should neither look for a GPU nor say so.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        done = reshard(
            options.run, options.world_size, options.step, trust=options.trust_checkpoint
        )
    except (UserError, OSError) as error:
        end_with(error, "reshard")
    print(done)


if __name__ == "__main__":
    main()
