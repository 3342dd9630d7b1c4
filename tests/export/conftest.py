"""Trained runs and their exported folders, made once for all tests of this folder."""

from pathlib import Path
from typing import Any

import pytest

from pal_ds.config.recipe import recipe_from_arguments
from pal_ds.data.prepare import prepare
from pal_ds.export import ExportOptions, export
from pal_ds.runs.run_dir import RunDirectory
from tests.export.cases import CASES, audience_of, write_inputs
from tests.spawn import run_ranks


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one trained run per case."""
    root = tmp_path_factory.mktemp("export")
    write_inputs(root)
    for case in {case.data: case for case in CASES}.values():
        prepare(
            recipe_from_arguments([f"--config={root / case.name / 'config.yaml'}"]).data, quiet=True
        )
    run_ranks(2, "tests.export.worker", root)
    return root


@pytest.fixture(scope="session")
def exported(runs: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Folder and facts of every case."""
    folders = {}
    for case in CASES:
        out = runs / f"{case.name}.out"
        options = ExportOptions(**audience_of(case), quiet=True, max_shard_size="60KB")
        folders[case.name] = out, export(RunDirectory(runs / case.name), out, options)
    return folders
