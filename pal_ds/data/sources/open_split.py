"""Opening what `datasets` reads, on the hub or in local files; what the hub refuses is said within seconds."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pal_ds.data.sources.base import check_files
from pal_ds.data.sources.csv_rows import refuse_other_delimiter
from pal_ds.data.sources.table_files import kind_of
from pal_ds.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

BUILDERS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
}
ALIASES = {"tsv": "csv", "jsonl": "json"}
"""Kinds of files that may stand for a dataset, beside those that `datasets` has a reader of."""
HUB_TIMEOUT_S = 10.0


def open_split(
    path: str,
    split: str,
    *,
    name: str | None = None,
    data_dir: str | None = None,
    data_files: str | list[str] | dict[str, str | list[str]] | None = None,
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

    if path in ALIASES and data_files is None and not Path(path).exists():
        raise UserError(f"path: {path} says how files are read; name them in data_files")
    where, builder = path, builder_of(path)
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
            where_in = {"name": name, "data_dir": data_dir, "data_files": data_files}
            return _load(path, split, {**where_in, "revision": revision})
    except UserError:
        raise
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
        reason = _first_cause(error)
        if "corresponds to no data" in reason:
            raise UserError(
                f"{where}: split '{split}' holds no row; a file of it needs comparisons below its header, and a folder "
                "at least one such file"
            ) from error
        raise UserError(
            f"{where}: datasets cannot open split '{split}' ({reason}); check path, "
            "name, split and data_files, and that this machine can reach the hub"
        ) from error


def _load(path: str, split: str, where: dict[str, Any]) -> "Dataset":
    """Load a split with every column of CSV as text: pandas would guess 7 of 007, nothing of NA.

    Raises:
        UserError: columns of CSV are separated by something else than its name says.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    data_files = where["data_files"]
    given = data_files.get(split) if isinstance(data_files, dict) else data_files
    names = [given] if isinstance(given, str) else given or []
    shown = ", ".join([path, *names])
    has_tabs = path == "tsv" or (names and all(kind_of(name) == ".tsv" for name in names))
    path = ALIASES.get(path, path)
    if path == "csv" and has_tabs:
        where = {**where, "sep": "\t"}
    try:
        table = datasets.load_dataset(path, split=split, **where)
        names = table.column_names
        if getattr(table.info, "builder_name", None) != "csv":
            return table
    except DatasetGenerationError:
        # A type that was guessed from the first rows does not fit later ones.
        names = _csv_columns(path, split, where)
        if not names:
            raise
    refuse_other_delimiter(names, shown, where.get("sep", "," if ".tsv" not in shown else "\t"))
    return datasets.load_dataset(
        path,
        split=split,
        **where,
        features=datasets.Features({name: datasets.Value("string") for name in names}),
        keep_default_na=False,
        na_values=[""],
    )


def _csv_columns(path: str, split: str, where: dict[str, Any]) -> list[str]:
    """Names of the columns of a dataset in CSV; empty for another kind."""
    import datasets
    import pandas

    builder = datasets.load_dataset_builder(path, **where)
    files = (builder.config.data_files or {}).get(split)
    if type(builder).__name__ != "Csv" or not files:
        return []
    return [*pandas.read_csv(files[0], sep=getattr(builder.config, "sep", ","), nrows=0).columns]


def _first_cause(error: BaseException) -> str:
    """The first line of what went wrong at first: `datasets` itself says that an error occurred."""
    seen = {id(error)}
    while error.__cause__ is not None and id(error.__cause__) not in seen:
        error = error.__cause__
        seen.add(id(error))
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def builder_of(path: str) -> str | None:
    """The reader of `datasets` for a file by its name; None for a name of another kind."""
    return BUILDERS.get(kind_of(path))


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
