"""`submit` on the command line: checks a job for SLURM against its recipe and hands it to sbatch."""

import datetime
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import SUPPRESS, ArgumentParser, Namespace

from pal_ds.cli.arguments import with_shipped_files
from pal_ds.cli.job_checks import JOBS, check_shape
from pal_ds.cli.sbatch_options import split_options
from pal_ds.errors import UserError
from pal_ds.io.files import shipped_folder

SCRIPTS = shipped_folder("slurm", "*.sbatch")
PASSED_ON = ("nodes", "ntasks_per_node", "gpus_per_node", "cpus_per_task", "time", "array")
SITE = ("partition", "account", "qos")


class Submit:
    """Check a job for SLURM against its recipe and hand it to sbatch.

    submit train RECIPE --run_dir D --nodes 4 --gpus_per_node 8 [--time 24:00:00] [-- --KEY VALUE ...];
    submit embed RECIPE --nodes 4 --gpus_per_node 8;
    submit evaluate RUN [-- --split dev];
    submit adapt RUN PAIRS.jsonl OUT --array 0-7;
    submit sweep RECIPE... --array 0-3 [--run_dir runs].

    Options of sbatch (--mem 64G, --exclusive) are passed on to it. What follows `--` goes to the pal-ds command. The
    job's id is kept in slurm/jobs.jsonl of the run directory (of OUT for adapt, of the cache for embed). The scripts
    that it hands in work without this command.
    """

    @staticmethod
    def add_arguments(parser: ArgumentParser) -> None:
        add = parser.add_argument
        add("job", type=Literal["train", "embed", "evaluate", "adapt", "sweep"])
        add("arguments", nargs="+", type=str, help="RECIPE, RUN, or RUN PAIRS OUT")
        add("--run_dir", type=str | None, help="unset: runs/NAME of the recipe")
        add("--nodes", type=int, default=1, help="nodes of the job")
        add("--gpus_per_node", type=int, default=1, help="0 on nodes without")
        add("--ntasks_per_node", type=int | None, help="ranks per node; unset: one per GPU")
        add("--cpus_per_task", type=int | None, help="CPU cores per rank")
        add("--time", type=str | None, help="as in 24:00:00")
        add("--array", type=str | None, help="shards, seeds or recipes, as in 0-7")
        for name in SITE:
            add(f"--{name}", type=str | None, help=f"the {name} of the site, for sbatch")
        add("--dry_run", action="store_true", help="print the command, submit nothing")
        add("--words", type=list[str], default=[], help=SUPPRESS)
        add("--sbatch", type=list[str], default=[], help=SUPPRESS)

    @staticmethod
    def arguments_of(given: list[str]) -> list[str]:
        """The arguments with options of sbatch as one option, and what follows `--` as another: none are this one's."""
        cut = given.index("--") if "--" in given else len(given)
        kept, passed_on = split_options(given[:cut])
        if passed_on:
            kept.append(f"--sbatch={json.dumps(passed_on)}")
        return [*kept, f"--words={json.dumps(given[cut + 1 :])}"] if given[cut:] else kept

    @staticmethod
    def run(options: Namespace, _: Namespace) -> None:
        check_shape(options)
        if options.job in ("train", "embed", "sweep"):
            # The name of a shipped recipe stands for its file, as after `--config` of other commands.
            options.arguments = [
                with_shipped_files(["train", "--config", recipe])[-1]
                for recipe in options.arguments
            ]
        record, job_words, notes = JOBS[options.job](options, options.words)
        command = sbatch_command(options, record, job_words)
        for note in notes:
            print(f"note: {note}", file=sys.stderr)
        if options.dry_run:
            print(shlex.join(command))
            return
        print(f"job {submit(command, record)}; it writes to {record}")


def sbatch_command(options: Namespace, record: Path, words: Sequence[str]) -> list[str]:
    """The words that hand the job in: options of sbatch, the script, and the words of the script."""
    log = "%x-%A_%a.out" if options.array else "%x-%j.out"
    folder = str(record / "slurm")
    if "\\" in folder:
        raise UserError(
            f"{record}: has a backslash, which turns off the job's number in the name of SLURM's log. Name another."
        )
    # A % of the folder's own is doubled, else SLURM would put the job's number or name there.
    log = f"{folder.replace('%', '%%')}/{log}"
    command = ["sbatch", "--parsable", f"--output={log}"]
    shape = options.clone()
    if options.job == "adapt":  # one process per shard, without a GPU
        shape.nodes = shape.ntasks_per_node = shape.gpus_per_node = None
    for name in (*PASSED_ON, *SITE):
        if shape[name] is not None:
            command.append(f"--{name.replace('_', '-')}={shape[name]}")
    return [*command, *options.sbatch, str(SCRIPTS / f"{options.job}.sbatch"), *words]


def submit(command: list[str], record: Path) -> str:
    """Hands the job in and writes its id down; the id.

    Raises:
        UserError: there is no sbatch, or it refuses.
    """
    # SLURM fails a job without a word where the folder of its log is missing.
    (record / "slurm").mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(
            "sbatch: not found. Submit from a login node of the cluster, or use --dry_run."
        ) from None
    if done.returncode:
        raise UserError(f"sbatch refused: {done.stderr.strip() or done.stdout.strip()}")
    job = done.stdout.strip().partition(";")[0]
    row = {
        "job": job,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "submitted_from": str(Path.cwd()),
        "command": command,
    }
    with open(record / "slurm" / "jobs.jsonl", "a") as stream:
        stream.write(json.dumps(row) + "\n")
    return job
