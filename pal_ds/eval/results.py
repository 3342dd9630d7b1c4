"""Requests for an evaluation, the names under which its figures are kept, and the JSON that holds them."""

import re
from collections.abc import Mapping
from glob import has_magic
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pal_ds.data.sources.base import Source
from pal_ds.data.splits import SPLITS
from pal_ds.data.tables import PreparedData
from pal_ds.errors import UserError, writing
from pal_ds.io.boundary import check_form, reading
from pal_ds.io.files import replacing, write_json
from pal_ds.io.text_files import parse_json
from pal_ds.runs.run_dir import RunDirectory

SPLIT = "test"
"""What is evaluated where nothing is named."""
NUM_EXAMPLE_PAIRS = 200
"""Comparisons, evenly among those of an evaluation, that each prototype scores for examples of what it prefers."""
USERS_IN_PARQUET_ABOVE = 10_000
NAME_PREFIX = "best_of_n_"
"""In front of the name of a result of `--best_of_n`."""
_TAKEN = {
    "few_shot": "of held-out users",
    **{split: f"of the run's own split {split}" for split in SPLITS},
    **{NAME_PREFIX + split: f"of choices in the run's own split {split}" for split in SPLITS},
}
"""Names of results that only one evaluation may write, and whose figures they are."""


class EvalRequest(NamedTuple):
    """A set to evaluate: a split of the run's data, or a file or source; the result goes to eval/NAME.json."""

    name: str
    split: str
    pairs: Path | Source | None
    out: Path | None = None
    """Folder for NAME.json in place of the run's eval."""
    num_example_pairs: int = NUM_EXAMPLE_PAIRS
    """Comparisons that each prototype scores for examples of what it prefers; 0: no examples."""
    by_prompt: bool = False
    """Also write how many comparisons of each prompt are ranked rightly, by which runs are paired."""

    def rows(self, data: PreparedData) -> np.ndarray:
        """Its comparisons, all those of the tables of a file or source. Raises UserError where a split has none."""
        if self.pairs is not None:
            return np.arange(len(data.comparisons))
        rows = data.rows(self.split)
        if len(rows) == 0:
            raise UserError(
                f"--split {self.split}: {data.path} has no pairs in it; it has {data.info['counts']['splits']}."
            )
        return rows


def name_of(file: Path) -> str:
    """Return the name of the result of a file, its stem, or what a pattern leaves of one.

    >>> name_of(Path("votes/dev.jsonl")), name_of(Path("votes/part-*.jsonl")), name_of(Path("*/[ab]?.jsonl"))
    ('dev', 'part', 'ab')
    >>> name_of(Path("votes/*.jsonl"))
    'votes'
    """
    if not has_magic(str(file)) or file.exists():
        return file.stem
    parts = (re.sub(r"[^\w.-]+", "_", part).strip("._-") for part in (file.stem, file.parent.name))
    return next(filter(None, parts), "files")


def split_request(split: str, name: str | None = None) -> EvalRequest:
    """Ask for one split of the run's data."""
    return eval_requests(split, [], name)[0]


def file_request(file: Path, name: str | None = None) -> EvalRequest:
    """Ask for one file of pairs."""
    return eval_requests(SPLIT, [file], name)[0]


def source_request(source: Source, name: str | None = None, prefix: str = "") -> EvalRequest:
    """Ask for all pairs of a source; unless it has a name, the result has that of the class."""
    _check_name(name)
    request = EvalRequest(name or prefix + type(source).__name__, SPLIT, source)
    _refuse_taken(request, prefix)
    return request


def eval_requests(
    split: str, files: list[Path], name: str | None, prefix: str = ""
) -> list[EvalRequest]:
    """Ask for the split, or each of the files, under `name` or else PREFIX and the split or the file's name.

    Raises:
        UserError: a name that is none or belongs to another result, or two results of one name.
    """
    _check_name(name)
    requests = [EvalRequest(name or prefix + name_of(file), split, file) for file in files]
    requests = requests or [EvalRequest(name or prefix + split, split, None)]
    names = [one.name for one in requests]
    for one in requests:
        _refuse_taken(one, prefix)
    if len(set(names)) < len(names):
        raise UserError(
            f"--data: the results of these files would go to one eval/NAME.json ({', '.join(names)}). Evaluate "
            "them one by one, each with a --name of its own."
        )
    return requests


def number_of_examples(given: int | None, *, best_of_n: bool) -> int:
    """Return how many pairs each prototype scores for examples. Raises UserError for a number that cannot be meant."""
    if given is not None and best_of_n:
        raise UserError(
            "--num_example_pairs: --best_of_n gives no examples of prototypes; leave it out."
        )
    if given is not None and given < 0:
        raise UserError(f"--num_example_pairs is {given}; it must be 0 (no examples) or more.")
    return NUM_EXAMPLE_PAIRS if given is None else given


def _refuse_taken(request: EvalRequest, prefix: str) -> None:
    """Raise UserError where figures of one thing would take the place of those of another that a report reads."""
    is_own = request.pairs is None and request.name == prefix + request.split
    if request.name in _TAKEN and not is_own:
        what = f"--split {request.split}" if request.pairs is None else request.pairs
        raise UserError(
            f"{what}: its figures would go to eval/{request.name}.json, where those {_TAKEN[request.name]} belong. "
            "Give another --name."
        )


def _check_name(name: str | None) -> None:
    if name is not None and (Path(name).name != name or name.startswith(".")):
        raise UserError(f"--name {name}: must be a plain name, the result goes to eval/NAME.json.")


def write_figures(
    run: RunDirectory, name: str, figures: Mapping[str, object], out: Path | None = None
) -> None:
    """Writes eval/NAME.json of the run, or OUT/NAME.json. Raises StorageError where it cannot be written."""
    folder = run.eval if out is None else out
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_user_figures(folder / f"{name}.json", figures)


def write_user_figures(path: Path, figures: Mapping[str, object]) -> None:
    """Writes `figures`, of which "users" is {id: {...}}; above 10,000 users those go to a parquet beside the file.

    "users" then holds the parquet's name. Raises StorageError where a file cannot be written.
    """
    users = figures.get("users", {})
    assert isinstance(users, dict)
    if len(users) > USERS_IN_PARQUET_ABOVE:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [{"user_id": user, **entry} for user, entry in users.items()]
        table = path.with_suffix(".parquet")
        with writing(table), replacing(table) as aside:
            pq.write_table(pa.Table.from_pylist(rows), aside)
        figures = {**figures, "users": table.name}
    write_json(path, figures)


def read_user_figures(path: Path, form: object, remedy: str) -> object:
    """Read the figures that `write_user_figures` was given, once they have the form of a TypedDict.

    Raises:
        UserError: the file, or the parquet that it names, is damaged or of another form; it ends in `remedy`.
    """
    with reading(path, "file of figures", remedy):
        figures = parse_json(path.read_text(encoding="utf-8"), str(path), f". {remedy}")
        if isinstance(figures, dict) and isinstance(figures.get("users"), str):
            import pyarrow.parquet as pq

            table = path.with_suffix(".parquet")
            if figures["users"] != table.name:
                raise ValueError(f"users: {figures['users']!r} is not the file beside it")
            rows = pq.read_table(table).to_pylist()
            figures["users"] = {row.pop("user_id"): row for row in rows}
        check_form(figures, form)
        return figures
