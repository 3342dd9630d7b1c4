"""The `score` command: which model, for whom, from where to where."""

import os
import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.arguments import as_path, mixture
from pal_ds.errors import UserError


class Score:
    """Scalar scores for texts in a JSONL file, from an exported model or a run."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--model", type=str, help="folder that `consolidate` wrote")
        parser.add_argument("--run_dir", type=str, help="directory that `train` wrote")
        parser.add_argument("--input", type=str, required=True, help="JSONL of prompt and response")
        parser.add_argument("--output", type=str, default="-", help="JSONL with scores; - prints")
        parser.add_argument("--mixture", type=mixture, help="w1,..,wK in place of a user")
        parser.add_argument("--user", type=str, help="user id of the run, or of --users")
        parser.add_argument("--group", type=str, help="group of the run's data, of --run_dir")
        parser.add_argument("--users", type=str, help="users that `adapt` fitted")
        parser.add_argument("--step", type=str, default="latest", help="a number, latest or best")
        parser.add_argument("--batch_texts", type=int, default=16, help="texts per forward")
        parser.add_argument(
            "--trust_checkpoint", action="store_true", help="read checkpoints of another owner"
        )
        parser.add_argument(
            "--trust_remote_code", action="store_true", help="run the code that lies in --model"
        )

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.inference.score_texts import read_rows, write_scores
        from pal_ds.reward_models import Whom, scorer_of_export, scorer_of_run
        from pal_ds.runs.run_dir import RunDirectory

        if (options.model is None) == (options.run_dir is None):
            raise UserError("score: give exactly one of --model and --run_dir.")
        if options.batch_texts < 1:
            raise UserError(f"--batch_texts is {options.batch_texts}; it must be at least 1.")
        output = Path(options.output)
        if options.output != "-" and (output.is_dir() or not output.parent.is_dir()):
            raise UserError(f"--output {output}: must be a file in a folder that exists.")
        rows = read_rows(Path(options.input))
        if options.output != "-" and output.exists() and output.samefile(options.input):
            raise UserError(f"--output {output}: is the --input. Name another file.")
        whom = Whom(options.user, options.mixture, options.group, as_path(options.users))
        if options.model is None:
            run, trust = RunDirectory(options.run_dir), options.trust_checkpoint
            scorer = scorer_of_run(run, whom, options.step, trust=trust)
        else:
            trust = options.trust_remote_code
            scorer = scorer_of_export(Path(options.model), whom, trust_remote_code=trust)
        if options.output == "-":
            write_scores(scorer, rows, sys.stdout, options.batch_texts)
            return
        temporary = output.with_name(f"{output.name}.tmp-{os.getpid()}")
        try:
            with open(temporary, "w", encoding="utf-8") as stream:
                write_scores(scorer, rows, stream, options.batch_texts)
            temporary.rename(output)
        finally:
            temporary.unlink(missing_ok=True)
