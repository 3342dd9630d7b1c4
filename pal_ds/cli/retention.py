"""`retention` on the command line."""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from pal_ds.cli.arguments import keys


class Retention:
    """Accuracy on general sets before and after a model was trained further, as a table.

    `evaluate` both runs on the same files first; SETS names their results, NAME,.. of eval/NAME.json.
    """

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        parser.add_argument("before", type=str, help="directory that `train` wrote")
        parser.add_argument("after", type=str, help="directory of the run that went on from it")
        parser.add_argument("sets", type=keys, help="NAME,.. of eval/NAME.json")
        parser.add_argument("--out", type=str, help="folder for retention.md and retention.json")

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        from pal_ds.eval.retention import retention, table
        from pal_ds.io.files import write_atomically, write_json
        from pal_ds.runs.run_dir import RunDirectory

        rows = retention(RunDirectory(options.before), RunDirectory(options.after), options.sets)
        if options.out:
            out = Path(options.out)
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "retention.json", rows)
            write_atomically(out / "retention.md", table(rows))
        sys.stdout.write(table(rows))
