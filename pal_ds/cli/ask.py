"""The command that chooses what to ask users next."""

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.arguments import add_run_arguments, options_of
from pal_ds.io.files import at_home
from pal_ds.runs.run_dir import RunDirectory


class Ask:
    """Choose for each fitted user the comparisons, out of a pool, whose answers would tell most."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add = parser.add_argument
        add_run_arguments(parser)
        add("--users", type=str, required=True, help="users that `adapt` fitted")
        add(
            "--candidates",
            type=str,
            required=True,
            help="JSONL of pairs, or of lists of responses; answers in it are not read",
        )
        add("--num", type=int, default=10, help="comparisons for each user")
        add(
            "--strategy",
            type=Literal["random", "d_optimal", "bald", "thompson"],
            default="bald",
            help="worth of a candidate: information on the point (d_optimal, bald), or on the best response",
        )
        add(
            "--user",
            action="append",
            default=[],
            metavar="ID",
            help="ask this user alone; repeatable",
        )
        add("--seed", type=int, default=0, help="of random and thompson")
        add("--out", type=str, required=True, help="JSONL to write: answer a line by adding y")

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.adaptation.ask import AskOptions, ask_run
        from pal_ds.data.sources import Jsonl

        more = {
            "candidates": Jsonl(str(at_home(options.candidates))),
            "users": at_home(options.users),
            "only": tuple(options.user),
        }
        result = ask_run(
            RunDirectory(options.run_dir),
            at_home(options.out),
            options_of(AskOptions, options, **more),
        )
        print(
            f"up to {options.num} of {result.num_candidates} candidates for each of {result.num_users} users "
            f"-> {options.out}"
        )
