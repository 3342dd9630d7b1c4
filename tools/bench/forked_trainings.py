"""The begin of a benchmark that disturbs trainings: its options, an empty folder, and a process that can fork ranks."""

import argparse
import random
import shutil
from pathlib import Path


def begin(
    parser: argparse.ArgumentParser, name: str
) -> tuple[argparse.Namespace, Path, random.Random]:
    """Parse the command line; return it, the emptied folder `--out`, and a generator from `--seed`.

    From here on this process has imported all that a training needs, so that ranks are forked from it in a second.
    """
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)

    from tests.warm import warm_up

    warm_up()
    return options, options.out.resolve(), random.Random(options.seed)
