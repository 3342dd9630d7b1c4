"""Opening what `datasets` reads, on the hub or in local files; what the hub refuses is said within seconds."""

import contextlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from pal_ds.data.parse import nearest
from pal_ds.data.sources.base import Source, check_files, describe_files
from pal_ds.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json"}
BATCH_ROWS = 1000
HUB_TIMEOUT_S = 10.0
PARQUET_EXPORT = "refs/convert/parquet"
"""Branch in which the hub keeps every dataset as parquet, also those it publishes as a script."""

HubPath = str | dict[str, str]
"""A hub id, a folder that mirrors the repository, one file (of the first split), or split -> file."""


def open_split(
    path: str,
    split: str,
    *,
    name: str | None = None,
    data_dir: str | None = None,
    data_files: str | list[str] | dict[str, str] | None = None,
    revision: str | None = None,
) -> "Dataset":
    """The `datasets.Dataset` of one split.

    A hub that does not answer is asked once, not six times with pauses; a copy in the cache of
    `datasets` then stands in for it.

    Raises:
        UserError: a file is missing, or the hub cannot be reached, does not know the dataset or
            keeps it behind a licence gate, or the data cannot be read.
    """
    import datasets

    where, builder = path, _builder_of(path)
    if builder and data_files is None:
        check_files(path)
        path, data_files = builder, {split: path}
    silence = None
    if not Path(path).exists():
        _check_id(path)
        silence = _ask_hub(path, revision) if "/" in path else None
    datasets.disable_progress_bars()
    try:
        with _cache_alone() if silence else contextlib.nullcontext():
            return datasets.load_dataset(
                path,
                name=name,
                data_dir=data_dir,
                data_files=data_files,
                split=split,
                revision=revision,
            )
    except Exception as error:
        # datasets raises a dozen unrelated classes here: all mean "cannot be opened".
        if silence:
            at = "" if revision is None else f" --revision {revision}"
            raise UserError(
                f"{path}: is no file or folder here, the Hugging Face hub cannot be reached "
                f"({silence}), and no copy is in its cache; fetch it where there is a network with "
                f"`hf download {path} --repo-type dataset{at} --local-dir FOLDER`, bring FOLDER "
                "here and give it as path"
            ) from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{where}: datasets cannot open split '{split}' ({reason}); check path, "
            "name, split and data_files, and that this machine can reach the hub"
        ) from error


def rows_of(table: "Dataset") -> Iterator[dict[str, Any]]:
    """Rows in order: `datasets` by itself takes ten times as long to give one after the other."""
    for batch in table.iter(batch_size=BATCH_ROWS):
        columns: dict[str, list] = dict(batch)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


class HubRows:
    """Rows of some splits of one published dataset, in the order of the splits; may be read again.

    Args:
        path: see `HubPath`.
        splits: the dataset's own names of its splits; one file stands for the first.
        columns: the columns to read; all others are left where they are.
        name: configuration, on the hub or in a folder.
        data_dir: folder inside the repository.
        revision: branch, tag or commit on the hub.
    """

    def __init__(
        self,
        path: HubPath,
        splits: tuple[str, ...],
        columns: tuple[str, ...],
        *,
        name: str | None = None,
        data_dir: str | None = None,
        revision: str | None = None,
    ) -> None:
        self.path = path
        self.columns = columns
        self.options = {"name": name, "data_dir": data_dir, "revision": revision}
        if isinstance(path, Mapping):
            for split in path:
                if split not in splits:
                    raise UserError(
                        f"path: the dataset has no split '{split}'{nearest(split, splits)}; its "
                        f"splits are {', '.join(splits)}"
                    )
            self.splits = tuple(split for split in splits if split in path)
        else:
            self.splits = splits[:1] if _builder_of(path) else splits

    def __iter__(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(place for messages, split, {column: value}) of every row."""
        for split, table in self._tables.items():
            for number, row in enumerate(rows_of(table)):
                yield f"{self._path_of(split)}, split {split}, row {number}", split, row

    def __len__(self) -> int:
        return sum(map(len, self._tables.values()))

    def describe(self) -> dict:
        """Describe what was opened: rows per split, and content hashes of local files."""
        described = {"path": self.path, **self.options, "rows": self.num_rows}
        files = describe_files(self._local_files())
        return {**described, "files": files} if files else described

    @property
    def num_rows(self) -> dict[str, int]:
        return {split: len(table) for split, table in self._tables.items()}

    def _local_files(self) -> list[Path]:
        paths = [Path(self._path_of(split)) for split in self.splits]
        if not paths[0].is_dir():
            return [path for path in paths if path.is_file()]
        folder = paths[0] / (self.options["data_dir"] or "")
        return sorted(path for path in folder.rglob("*") if _builder_of(path.name))

    def _path_of(self, split: str) -> str:
        return self.path if isinstance(self.path, str) else self.path[split]

    @cached_property
    def _tables(self) -> dict[str, Any]:
        return {split: self._open(split) for split in self.splits}

    def _open(self, split: str) -> "Dataset":
        path = self._path_of(split)
        if isinstance(self.path, Mapping):
            check_files(path)
            if _builder_of(path) is None:
                raise UserError(f"{path}: ends in none of {', '.join(BUILDERS)}; give such a file")
        options = {} if _builder_of(path) else self.options
        if Path(path).exists():
            # A copy has whatever revision was fetched.
            options = {**options, "revision": None}
        table = open_split(path, split, **options)
        names = table.column_names
        for column in self.columns:
            if column not in names:
                raise UserError(
                    f"{path}, split {split}: no column '{column}'{nearest(column, names)}; it has "
                    f"{', '.join(names)}, which is not the published form"
                )
        return table.select_columns([*self.columns])


class HubSource(Source):
    """A source that reads one published dataset."""

    _rows: HubRows

    def describe(self) -> dict:
        return {"class": type(self).__name__, **self._rows.describe()}


class PromptSplits:
    """The split each prompt was first met in: in two, it would carry training data into a test."""

    def __init__(self) -> None:
        self._splits: dict[int, str] = {}

    def admits(self, prompt: str, split: str) -> bool:
        """Return whether the prompt is new or belongs to this split."""
        key = xxhash.xxh3_64_intdigest(prompt.encode("utf-8", "surrogatepass"))
        return self._splits.setdefault(key, split) == split


def text_of(value: object, where: str, key: str) -> str:
    """A text without blank space around it, empty for null; a UserError for anything else."""
    if value is None or isinstance(value, str):
        return (value or "").strip()
    raise UserError(
        f"{where}: '{key}' is {type(value).__name__}; the published rows have text there"
    )


def _builder_of(path: str) -> str | None:
    return BUILDERS.get(Path(path.removesuffix(".gz")).suffix)


def _check_id(path: str) -> None:
    """Raises UserError for what is no file or folder, and cannot be the name of a dataset on the hub either."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(path)
    except HFValidationError:
        raise UserError(
            f"{path}: no such file or folder (looked from {Path.cwd()}), and no id of a dataset on the hub, which is "
            "OWNER/NAME; check the path"
        ) from None


def _ask_hub(path: str, revision: str | None) -> str | None:
    """None if the hub would serve the dataset, why not if it is silent; a UserError if it refuses."""
    from huggingface_hub import HfApi, errors
    from huggingface_hub.utils import httpx

    api = HfApi()
    try:
        if api.dataset_info(path, revision=revision, timeout=HUB_TIMEOUT_S).gated:
            api.auth_check(path, repo_type="dataset")
    except errors.GatedRepoError as error:
        raise UserError(
            f"{path}: lies behind a licence gate on the hub; accept its terms at "
            f"{api.endpoint}/datasets/{path}, then log in here with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{path}: neither a file or folder here nor a dataset on the hub that this login may "
            "read; check the name, or log in with `hf auth login` if it is private"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{path}: has no revision '{revision}' on the hub; name another") from error
    except errors.HfHubHTTPError as error:
        return f"it answers {error.response.status_code}"
    except errors.OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    return None


@contextlib.contextmanager
def _cache_alone() -> Iterator[None]:
    """`datasets` looks into its cache without asking the hub; it has no such switch per call."""
    import datasets.config

    before = datasets.config.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE = before
