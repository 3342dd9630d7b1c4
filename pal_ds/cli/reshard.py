"""`reshard` on the command line."""

import os

from jsonargparse import ArgumentParser, Namespace

from pal_ds.errors import UserError


class Reshard:
    """Rewrite a checkpoint for another number of ranks, as if they had written it.

    `train` does the same by itself when it resumes on another number of ranks; this is for a job that is to start at
    once. The step keeps its number and its place in RUN; the old one stays until the new one is whole on the disk.
    Weights, moments, step counts, buffers and users keep every bit, so going back is this again with the old W. One
    process, no GPU; memory is one shard.
    """

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("run", type=str, help="directory that `train` wrote")
        parser.add_argument(
            "--world_size", type=int, required=True, metavar="W", help="ranks to come"
        )
        parser.add_argument("--step", type=str, default="latest", help="a number, latest or best")
        parser.add_argument(
            "--trust_checkpoint", action="store_true", help="read checkpoints of another owner"
        )

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        # DeepSpeed is imported for its defaults alone, and should neither look for a GPU nor say so.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from pal_ds.engine.checkpoint.reshard import exchange_step
        from pal_ds.runs.run_dir import RunDirectory

        if options.world_size < 1:
            raise UserError(f"--world_size is {options.world_size}; it must be at least 1.")
        run = RunDirectory(options.run)
        print(exchange_step(run, options.world_size, options.step, trust=options.trust_checkpoint))
