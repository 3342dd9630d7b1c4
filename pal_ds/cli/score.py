"""The `score` command: which model, for whom, from where to where."""

import os
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.arguments import mixture
from pal_ds.errors import UserError


class Score:
    """Scalar scores for texts in a JSONL file, from an exported model or a run."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("--model", type=str, help="folder that tools/consolidate.py wrote")
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

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.inference.score_texts import read_rows, write_scores

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
        scorer = _from_run(options) if options.model is None else _from_model(options)
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


def _from_run(options: Namespace):
    from pal_ds.data.tokenise import TextEncoder
    from pal_ds.export.audience import choose_audience
    from pal_ds.inference.load_run import open_run
    from pal_ds.inference.score_texts import Scorer
    from pal_ds.reward_models import model_of_run
    from pal_ds.runs.run_dir import RunDirectory

    opened = open_run(RunDirectory(options.run_dir), options.step, trust=options.trust_checkpoint)
    model = model_of_run(opened)
    audience = choose_audience(
        model.head,
        opened.users,
        user=options.user,
        mixture=options.mixture,
        users_dir=Path(options.users) if options.users else None,
        group=options.group,
        groups=opened.data.groups,
    )
    model.config.mixture = audience.mixture
    encoder = TextEncoder.from_info(opened.data.info["tokens"], opened.data.tokenizer_path)
    return Scorer(model, encoder)


def _from_model(options: Namespace):
    from pal_ds.data.tokenise import TextEncoder
    from pal_ds.export.audience import choose_audience
    from pal_ds.export.tokenizer import open_tokenizer
    from pal_ds.inference.score_texts import Scorer
    from pal_ds.reward_models import load_reward_model, read_facts
    from pal_ds.users import UserTable

    folder = Path(options.model)
    if options.group is not None:
        raise UserError(
            "score: an exported model knows no groups. Export one of a group (consolidate --group), score with "
            "--run_dir, or give --mixture."
        )
    if (options.user is None) != (options.users is None):
        raise UserError(
            "score: an exported model knows no user ids. Give --user with the --users folder that holds "
            "it, score with --run_dir, or give --mixture."
        )
    if not (folder / "export.json").is_file():
        raise UserError(f"--model {folder}: no export.json here; make it by tools/consolidate.py.")
    facts = read_facts(folder)
    tokens = facts["tokens"]
    encoder = TextEncoder(
        open_tokenizer(folder),
        max_length=tokens["max_length"],
        separator=tokens["separator"] or "",
        chat_template="auto" if tokens["chat_template"] else "never",
        # The tokenizer of a stock export writes them into every text by itself.
        special_tokens=tokens["special_tokens"] and not facts["stock_class"],
    )
    model: Any = load_reward_model(folder, options.mixture)
    if options.user is not None:
        if facts["mixture"] is None:
            raise UserError(
                f"{folder}: {facts['head']} has one reward for everyone: leave out --user."
            )
        users = Path(options.users)
        audience = choose_audience(
            model.head,
            UserTable.load(users),
            user=options.user,
            mixture=options.mixture,
            users_dir=users,
        )
        model.config.mixture = audience.mixture
    return Scorer(model, encoder)
