"""The commands around reward models as folders: exporting, importing, scoring texts."""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.arguments import (
    STEP,
    add_trust,
    as_path,
    imports_at_once,
    leave_of,
    mixture,
    options_of,
)
from pal_ds.errors import UserError, writing
from pal_ds.io.files import at_home


class Consolidate:
    """Sharded checkpoint to a scalar reward model that transformers opens by itself.

    One process, no DeepSpeed, no GPU; a backbone that was trained whole streams tensor by tensor.
    --users names people, each of whom gets a folder OUT/USER; all of these share one set of weights. It is a folder
    that `adapt` wrote, for all users of it, a file of user ids, one a line, or ids with commas between. A folder beside
    one of the others, or beside --user or --with_users, is where users are looked up first.
    """

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add = parser.add_argument
        add("run", type=str, help="directory that `train` wrote")
        add("out", type=str, help="folder to make")
        add("--step", **STEP)
        whom = parser.add_mutually_exclusive_group()
        whom.add_argument("--user", type=str, metavar="ID", help="score for this user")
        whom.add_argument("--group", type=str, metavar="NAME", help="score for this group")
        whom.add_argument("--mixture", type=mixture, help="weights of the prototypes, w1,..,wK")
        whom.add_argument("--population", action="store_true", help="mean of seen users (default)")
        add(
            "--users",
            action="append",
            metavar="U|FILE|a,b",
            default=[],
            help="a folder for each user of a folder that `adapt` wrote, of a file of ids, or of a list: a,b",
        )
        add("--with_users", action="store_true", help="also write ids and mixtures")
        add("--dtype", default="fp32", choices=("fp32", "bf16"), help="of the weights on disk")
        add("--max_shard_size", type=str, default="4GB", help="of a weight file, as in 500MB")
        add("--data", type=str, help="prepared data, if they were moved")
        add("--reward_mean", type=float, help="stored in config.json, not applied")
        add("--reward_std", type=float, help="stored in config.json, not applied")
        add_trust(parser)

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        with imports_at_once():
            from pal_ds.export import ExportOptions, export, export_users, read_user_list, users_of
            from pal_ds.runs.run_dir import RunDirectory

        run, out = RunDirectory(options.run), at_home(options.out)
        adapted, listed = split_users(options.users)
        data_path = at_home(options.data) if options.data else None
        chosen = options_of(ExportOptions, options, users_dir=adapted, data_path=data_path)
        one = options.user, options.group, options.mixture, options.population, options.with_users
        user_ids = [] if listed is None else read_user_list(listed)
        if adapted is not None and listed is None and not any(one):
            user_ids = users_of(adapted)
        if not user_ids:
            facts = export(run, out, chosen)
            whom = facts["audience"]
        else:
            facts = export_users(run, out, user_ids, chosen)
            whom = f"{len(user_ids)} users, a folder each (users.json)"
        print(
            f"{out}: step {facts['step']}, scores for {whom}; largest difference "
            f"to the trainer {facts['max_difference']:.2e}"
        )


def split_users(values: list[str]) -> tuple[Path | None, str | None]:
    """(folder of an adapted table, file of ids or ids with commas between) among the values of --users.

    Raises:
        UserError: a path where nothing is, or two of a kind.
    """
    for value in values:
        if not Path(value).exists() and "," not in value:
            raise UserError(
                f"--users {value}: nothing is there. Give a folder that `adapt` wrote, a file of user ids, one a line, "
                "or several ids with commas between; one user alone goes by --user."
            )
    folders, lists = ([v for v in values if Path(v).is_dir() == kind] for kind in (True, False))
    for found in (folders, lists):
        if len(found) > 1:
            raise UserError(
                f"--users {found[0]} and {found[1]}: give at most one folder and one file or list."
            )
    return (Path(folders[0]) if folders else None), (lists or [None])[0]


class ImportReference:
    """Checkpoint of the PAL reference to a reward model folder and a user table.

    CHECKPOINT is a Lightning .ckpt or a state dict of RamyaLab/pluralistic-alignment; no object in it is loaded.
    --config is the file of config/prefLearner_config that it was trained with, for tensors do not say which variant
    they belong to. OUT loads as the folders of `consolidate` do; --users_out is a table as `adapt` leaves it.
    """

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add = parser.add_argument
        add("checkpoint", type=str, help=".ckpt or state dict")
        add("out", type=str, help="folder to make")
        add("--config", type=str, required=True, help="its prefLearner_config")
        add(
            "--backbone",
            type=str,
            required=True,
            help="folder of its llm_name: config, tokenizer, and weights where CHECKPOINT has none",
        )
        add("--users_out", type=str, metavar="U", help="folder for the user table")
        whom = parser.add_mutually_exclusive_group()
        whom.add_argument("--user", type=str, metavar="ID", help="score for this user")
        whom.add_argument("--mixture", type=mixture, help="weights of the prototypes, w1,..,wK")
        whom.add_argument("--population", action="store_true", help="mean of its users (default)")
        add(
            "--end_text",
            type=str,
            default="<|endoftext|>",
            help="end_of_conversation_token of its ds_config",
        )
        add("--prompt_end", type=str, default=" Assistant:", help="how every prompt ended (PAL-B)")
        add("--max_length", type=int, default=512, help="max_seq_len of its ds_config")
        add("--dtype", default="fp32", choices=("fp32", "bf16"), help="of the weights on disk")
        add("--max_shard_size", type=str, default="4GB", help="of a weight file, as in 500MB")

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.export.pal_reference.checkpoint import ImportOptions, import_checkpoint

        out = at_home(options.out)
        paths = {name: as_path(options[name]) for name in ("config", "backbone", "users_out")}
        chosen = options_of(ImportOptions, options, **paths)
        facts = import_checkpoint(at_home(options.checkpoint), out, chosen)
        print(f"{out}: {facts['head']}, scores for {facts['audience']}")


class Score:
    """Scalar scores for texts in a JSONL file, from an exported model or a run."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add = parser.add_argument
        add("--model", type=str, help="folder that `consolidate` wrote")
        add("--run_dir", type=str, help="directory that `train` wrote")
        add(
            "--input",
            type=str,
            required=True,
            help="JSONL of prompt and response; - reads standard input",
        )
        add("--output", type=str, default="-", help="JSONL with scores; - prints")
        add("--mixture", type=mixture, help="w1,..,wK in place of a user")
        add("--user", type=str, help="user id of the run, or of --users")
        add("--group", type=str, help="group of the run's data, of --run_dir")
        add("--users", type=str, help="users that `adapt` fitted")
        add("--std", action="store_true", help="add reward_std, how sure each score is of its user")
        add("--pessimism", type=float, help="standard deviations to take off each score")
        add("--step", **STEP)
        add("--batch_texts", type=int, default=16, help="texts per forward")
        add_trust(parser)
        add("--trust_remote_code", action="store_true", help="run the code that lies in --model")
        add("--verify", action="store_true", help="hash all of --model, as its first opening does")

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        with imports_at_once():
            from pal_ds.inference.score_texts import write_scores
            from pal_ds.inference.sure_scores import with_posterior
            from pal_ds.inference.text_rows import read_rows, warn_of_scored
            from pal_ds.io.files import replacing
            from pal_ds.reward_models import Whom, scorer_of_export, scorer_of_run
            from pal_ds.runs.run_dir import RunDirectory

        if (options.model is None) == (options.run_dir is None):
            raise UserError("score: give exactly one of --model and --run_dir.")
        if options.batch_texts < 1:
            raise UserError(f"--batch_texts is {options.batch_texts}; it must be at least 1.")
        output = at_home(options.output)
        if options.output != "-" and (output.is_dir() or not output.parent.is_dir()):
            raise UserError(f"--output {output}: must be a file in a folder that exists.")
        source = at_home(options.input)
        are_files = options.output != "-" and source.is_file() and output.is_file()
        if are_files and output.samefile(source):
            raise UserError(f"--output {output}: is the --input. Name another file.")
        rows = read_rows(source)
        warn_of_scored(rows)
        whom = Whom(options.user, options.mixture, options.group, as_path(options.users))
        if options.model is None:
            run = RunDirectory(options.run_dir)
            scorer = scorer_of_run(run, whom, options.step, **leave_of(options))
        else:
            scorer = scorer_of_export(
                at_home(options.model),
                whom,
                trust_remote_code=options.trust_remote_code,
                verify=options.verify or None,
            )
        if options.std or options.pessimism is not None:
            c = options.pessimism or 0.0
            scorer = with_posterior(scorer, whom.users_dir, options.user, pessimism=c)
        if options.output == "-":
            write_scores(scorer, rows, sys.stdout, options.batch_texts)
            return
        with writing(output), replacing(output) as aside, open(aside, "w", encoding="utf-8") as out:
            write_scores(scorer, rows, out, options.batch_texts)
