"""The commands that measure or use trained runs: evaluations, new users, reports."""

import json
import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.arguments import (
    TRUST,
    add_run_arguments,
    add_trust,
    as_path,
    keys,
    leave_of,
    options_of,
    split_words,
    whole_numbers,
)
from pal_ds.errors import UserError
from pal_ds.io.files import at_home
from pal_ds.runs.run_dir import RunDirectory

SOLVER: dict[str, Any] = {
    "type": Literal["auto", "newton", "adam", "reference"],
    "default": "auto",
    "help": "newton from statistics; adam, the same objective; reference, AdamW that stops early",
}


class Evaluate:
    """Accuracy per user of a run on a split or on files, or best of n; exact at any world size."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        from pal_ds.data.sources import Source
        from pal_ds.eval.results import NUM_EXAMPLE_PAIRS, SPLIT

        add = parser.add_argument
        add_run_arguments(parser)
        add("--split", type=str, help=f"split of the run's data (default: {SPLIT})")
        add(
            "--data",
            type=str,
            nargs="+",
            default=[],
            help="files of pairs in place of a split: A B, or A,B",
        )
        add(
            "--source",
            type=Source | None,
            default=None,
            help="a source of pairs in place of a split, as in a recipe: --source Dsp --source.path FILE",
        )
        add("--name", type=str, help="result goes to eval/NAME.json")
        add("--out", type=str, help="folder for NAME.json in place of the run's eval")
        add("--users", type=str, help="users that `adapt` fitted")
        add(
            "--best_of_n",
            action="store_true",
            help="choose among candidates: lines of responses and scores, or what users compared",
        )
        add(
            "--num_example_pairs",
            type=int,
            help=f"pairs that each prototype scores for examples (default: {NUM_EXAMPLE_PAIRS}); 0: none",
        )

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.eval.best_of_n import rank_set, ranking_line
        from pal_ds.eval.evaluate import evaluate_set, restored_by_ranks, summary_line
        from pal_ds.eval.results import (
            NAME_PREFIX,
            SPLIT,
            eval_requests,
            number_of_examples,
            source_request,
        )

        measure, line_of, prefix = evaluate_set, summary_line, ""
        if options.best_of_n:
            measure, line_of, prefix = rank_set, ranking_line, NAME_PREFIX
        files = [at_home(file) for file in split_words(options.data)]
        if files and options.source is not None:
            raise UserError("evaluate: give --data or --source, not both.")
        examples = number_of_examples(options.num_example_pairs, best_of_n=options.best_of_n)
        if options.split is not None and (files or options.source is not None):
            raise UserError(
                "evaluate: give --split, or --data or --source in place of a split, not both."
            )
        requests = (
            eval_requests(options.split or SPLIT, files, options.name, prefix)
            if options.source is None
            else [source_request(options.source, options.name, prefix)]
        )
        more = {"out": as_path(options.out), "num_example_pairs": examples}
        requests = [request._replace(**more) for request in requests]
        run, users = RunDirectory(options.run_dir), as_path(options.users)
        leave = leave_of(options)
        with restored_by_ranks(run, options.step, users, **leave) as (world, restored, known):
            for request in requests:
                figures = measure(restored, known, request, world)
                if world.is_rank_zero:
                    print(line_of(request.name, figures))
                    for warning in figures.get("warnings", []):
                        print(f"warning: {warning}")


class FewShot:
    """Accuracy of held-out users after k comparisons, for several k; result goes to eval/few_shot.json."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add = parser.add_argument
        add_run_arguments(parser)
        add(
            "--num_comparisons",
            type=str,
            nargs="+",
            default=["0", "1", "2", "4", "8", "16", "32", "50"],
            help="values of k: 0 4 16, or 0,4,16",
        )
        add("--num_draws", type=int, default=20, help="random draws of the k comparisons")
        add("--solver", **SOLVER)
        add(
            "--strategy",
            type=keys,
            default=["random"],
            help="how the k are chosen: random,d_optimal,bald,thompson; each beside random",
        )

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.adaptation.few_shot import evaluate_few_shot, few_shot_lines
        from pal_ds.inference.load_run import open_run

        counts = whole_numbers("--num_comparisons", options.num_comparisons)
        run, (trust, code) = RunDirectory(options.run_dir), leave_of(options).values()
        opened = open_run(run, options.step, trust=trust, trust_code=code)
        figures = evaluate_few_shot(
            opened,
            counts,
            options.num_draws,
            solver=options.solver,
            strategies=tuple(options.strategy),
        )
        print("\n".join(few_shot_lines(figures)))


class Adapt:
    """Fit new users to a trained run from a few comparisons each; the model stays as it is."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add = parser.add_argument
        add_run_arguments(parser)
        add("--pairs", type=str, help="JSONL of the new users' comparisons")
        add(
            "--split",
            type=str,
            help="split of the run's data, without --pairs (default: unseen_train)",
        )
        add("--num_pairs", type=int, help="comparisons to keep per user; unset keeps all")
        add("--seed", type=int, default=0, help="of the draw of comparisons")
        add("--solver", **SOLVER)
        add(
            "--no_posterior",
            action="store_true",
            help="skip how sure each fit is, and how well it does on pairs left out",
        )
        add("--out", type=str, required=True, help="directory for the user table and its report")

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.adaptation.run import AdaptOptions, adapt_run

        more = {"pairs": as_path(options.pairs), "posterior": not options.no_posterior}
        chosen = options_of(AdaptOptions, options, **more)
        report = adapt_run(RunDirectory(options.run_dir), at_home(options.out), chosen)
        print(f"{len(report['users'])} users from {report['pairs']} pairs -> {options.out}")


class Users:
    """List the users of a run, or make it forget one."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add = parser.add_argument
        add("--run_dir", type=str, required=True, help="directory that `train` wrote")
        add("--list", action="store_true", help="print user ids and mixtures as JSONL")
        add("--remove", type=str, help="user id to forget")
        add_trust(parser)

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.engine.checkpoint.forget import forget_user
        from pal_ds.inference.mixtures import list_users

        run = RunDirectory(options.run_dir)
        if options.list == (options.remove is not None):
            raise UserError("users: give exactly one of --list and --remove ID.")
        if options.list:
            trust, code = options.trust_checkpoint, options.trust_code
            for line in list_users(run, trust=trust, trust_code=code):
                print(json.dumps(line))
            return
        done = forget_user(run, options.remove, trust=options.trust_checkpoint)
        print(
            f"forgot {options.remove}: checkpoints {done['steps']}, evaluations {done['evaluations']}."
        )
        print(
            "The raw and prepared data, and models exported before, are not this run's: delete the user there too."
        )


class Report:
    """Pictures and a page for one run, or several side by side."""

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add = parser.add_argument
        add(
            "--run_dirs",
            type=str,
            nargs="+",
            required=True,
            help="directories that `train` wrote: A B, or A,B",
        )
        add("--out", type=str, required=True, help="directory for report.md and its pictures")
        add_trust(parser)

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.eval.report import write_report

        paths = list(dict.fromkeys(split_words(options.run_dirs)))
        names = [Path(path).name for path in paths]
        # Two runs may end in the same name; then the whole path tells them apart.
        labels = names if len(set(names)) == len(names) else paths
        runs = {label: RunDirectory(path) for label, path in zip(labels, paths, strict=True)}
        for run in runs.values():
            run.require_run()
        trust, code = options.trust_checkpoint, options.trust_code
        print(write_report(runs, at_home(options.out), trust=trust, trust_code=code))


class Retention:
    """Accuracy on general sets before and after a model was trained further, as a table.

    `evaluate` both runs on the same files first; SETS names their results, NAME,.. of eval/NAME.json.
    """

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add = parser.add_argument
        add("before", type=str, help="directory that `train` wrote")
        add("after", type=str, help="directory of the run that went on from it")
        add("sets", type=keys, help="NAME,.. of eval/NAME.json")
        add("--out", type=str, help="folder for retention.md and retention.json")
        add("--trust_checkpoint", **TRUST)

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.engine.checkpoint.verify import refuse_strangers_run
        from pal_ds.eval.retention import retention, table
        from pal_ds.io.files import write_atomically, write_json

        runs = RunDirectory(options.before), RunDirectory(options.after)
        for run in runs:
            if run.path.is_dir() and not options.trust_checkpoint:
                refuse_strangers_run(run)
        rows = retention(runs[0], runs[1], options.sets)
        if options.out:
            out = at_home(options.out)
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "retention.json", rows)
            write_atomically(out / "retention.md", table(rows))
        sys.stdout.write(table(rows))
