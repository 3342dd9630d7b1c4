"""Requests for an evaluation: what it scores, and under which name its result is kept."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pal_ds.data.tables import PreparedData
from pal_ds.errors import UserError


class EvalRequest(NamedTuple):
    """A set to evaluate: a split of the run's data, or a file in its place; the result goes to eval/NAME.json."""

    name: str
    split: str
    file: Path | None

    def rows(self, data: PreparedData) -> np.ndarray:
        """Its comparisons, all those of the tables of a file. Raises UserError where a split has none."""
        if self.file is not None:
            return np.arange(len(data.comparisons))
        rows = data.rows(self.split)
        if len(rows) == 0:
            raise UserError(
                f"--split {self.split}: {data.path} has no pairs in it; it has {data.info['counts']['splits']}."
            )
        return rows


def split_request(split: str, name: str | None = None) -> EvalRequest:
    """Ask for one split of the run's data."""
    return eval_requests(split, [], name)[0]


def file_request(file: Path, name: str | None = None) -> EvalRequest:
    """Ask for one file of pairs."""
    return eval_requests("test", [file], name)[0]


def eval_requests(
    split: str, files: list[Path], name: str | None, prefix: str = ""
) -> list[EvalRequest]:
    """Ask for the split, or each of the files, under `name` or else PREFIX and the split or the file's stem.

    Raises:
        UserError: a name that is none, or two results of one name.
    """
    if name is not None and (Path(name).name != name or name.startswith(".")):
        raise UserError(f"--name {name}: must be a plain name, the result goes to eval/NAME.json.")
    if not files:
        return [EvalRequest(name or prefix + split, split, None)]
    requests = [EvalRequest(name or prefix + file.stem, split, file) for file in files]
    names = [one.name for one in requests]
    if len(set(names)) < len(names):
        raise UserError(
            f"--data: the results of these files would go to one eval/NAME.json ({', '.join(names)}). Evaluate "
            "them one by one, each with a --name of its own."
        )
    return requests
