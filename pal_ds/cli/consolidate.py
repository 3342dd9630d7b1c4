"""`consolidate` on the command line: whose reward, from which step, into which folder."""

import gc
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.arguments import mixture
from pal_ds.errors import UserError


class Consolidate:
    """Sharded checkpoint to a scalar reward model that transformers opens by itself.

    One process, no DeepSpeed, no GPU; a backbone that was trained whole streams tensor by tensor.
    --users names a folder that `adapt` wrote, in which users are looked up first, or a file of user ids, one a line,
    each of whom gets a folder OUT/USER; all of these share one set of weights. Both may be given.
    """

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("run", type=str, help="directory that `train` wrote")
        parser.add_argument("out", type=str, help="folder to make")
        parser.add_argument("--step", type=str, default="latest", help="a number, latest or best")
        whom = parser.add_mutually_exclusive_group()
        whom.add_argument("--user", type=str, metavar="ID", help="score for this user")
        whom.add_argument("--group", type=str, metavar="NAME", help="score for this group")
        whom.add_argument("--mixture", type=mixture, metavar="w1,..,wK")
        whom.add_argument("--population", action="store_true", help="mean of seen users (default)")
        parser.add_argument(
            "--users",
            action="append",
            metavar="U|FILE",
            default=[],
            help="a folder of users that `adapt` fitted, or a file of ids, one a line: a folder for each",
        )
        parser.add_argument("--with_users", action="store_true", help="also write ids and mixtures")
        parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
        parser.add_argument(
            "--max_shard_size", type=str, default="4GB", help="of a weight file, as in 500MB"
        )
        parser.add_argument("--data", type=str, help="prepared data, if they were moved")
        parser.add_argument("--reward_mean", type=float, help="stored in config.json, not applied")
        parser.add_argument("--reward_std", type=float, help="stored in config.json, not applied")
        parser.add_argument(
            "--trust_checkpoint", action="store_true", help="read checkpoints of another owner"
        )

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.export import ExportOptions, export, export_users, read_user_list
        from pal_ds.runs.run_dir import RunDirectory

        # Nothing imported goes away: a full collection over all of it takes a quarter of a second.
        gc.freeze()
        run, out = RunDirectory(options.run), Path(options.out)
        adapted, listed = split_users([Path(path) for path in options.users])
        export_options = ExportOptions(
            step=options.step,
            user=options.user,
            mixture=options.mixture,
            group=options.group,
            users_dir=adapted,
            with_users=options.with_users,
            dtype=options.dtype,
            max_shard_size=options.max_shard_size,
            data_path=Path(options.data) if options.data else None,
            trust_checkpoint=options.trust_checkpoint,
            reward_mean=options.reward_mean,
            reward_std=options.reward_std,
        )
        if listed is None:
            facts = export(run, out, export_options)
            whom = facts["audience"]
        else:
            user_ids = read_user_list(listed)
            facts = export_users(run, out, user_ids, export_options)
            whom = f"{len(user_ids)} users, a folder each (users.json)"
        print(
            f"{out}: step {facts['step']}, scores for {whom}; largest difference "
            f"to the trainer {facts['max_difference']:.2e}"
        )


def split_users(paths: list[Path]) -> tuple[Path | None, Path | None]:
    """(folder of an adapted table, file of ids) among the values of --users.

    Raises:
        UserError: a path where nothing is, or two of a kind.
    """
    for path in paths:
        if not path.exists():
            raise UserError(
                f"--users {path}: nothing is there. Give a folder that `adapt` wrote, or a file of "
                "user ids, one a line."
            )
    folders, files = ([p for p in paths if p.is_dir() == kind] for kind in (True, False))
    for found in (folders, files):
        if len(found) > 1:
            raise UserError(
                f"--users {found[0]} and {found[1]}: give at most one folder and one file."
            )
    return (folders or [None])[0], (files or [None])[0]
