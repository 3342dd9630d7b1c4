"""Which sets an evaluation is asked for, and under which names their results go."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from pal_ds.data.tables import PreparedData
from pal_ds.errors import UserError


class Asked(NamedTuple):
    """One set to evaluate: a split of the run's data, or a file in its place; the result goes to eval/NAME.json."""

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


def asked_sets(split: str, files: list[Path], name: str | None, prefix: str = "") -> list[Asked]:
    """The split, or each of the files, under `name` or else PREFIX and the split or the file's stem.

    Raises:
        UserError: a name that is none, or two results of one name.
    """
    if name is not None and (Path(name).name != name or name.startswith(".")):
        raise UserError(f"--name {name}: must be a plain name, the result goes to eval/NAME.json.")
    if not files:
        return [Asked(name or prefix + split, split, None)]
    asked = [Asked(name or prefix + file.stem, split, file) for file in files]
    names = [one.name for one in asked]
    if len(set(names)) < len(names):
        raise UserError(
            f"--data: the results of these files would go to one eval/NAME.json ({', '.join(names)}). Evaluate "
            "them one by one, each with a --name of its own."
        )
    return asked
