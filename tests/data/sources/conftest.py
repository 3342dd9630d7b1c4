"""Rows in a public schema -> the parquet file that the hub serves."""

from collections.abc import Callable

import datasets
import pytest

WriteParquet = Callable[..., str]


@pytest.fixture(autouse=True)
def hf_cache(tmp_path, monkeypatch):
    """`datasets` keeps what it read in the test's own folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf_cache"))


@pytest.fixture
def write_parquet(tmp_path) -> WriteParquet:
    """(rows, features, name) -> path; the features are the published ones, so the rows must fit them."""

    def write(rows: list[dict], features: dict, name: str = "rows.parquet") -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        table.to_parquet(path)
        return str(path)

    return write
