"""The notebook runs from its first cell to its last, and shows what its text says."""

import ast
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.spawn import ROOT, environment

NOTEBOOK = ROOT / "examples" / "own_comparisons.ipynb"


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """(the folder that it ran in, the notebook with outputs)."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment(MPLBACKEND="agg").items():
            patch.setenv(name, value)
        place = {"metadata": {"path": str(folder)}}
        NotebookClient(notebook, kernel_name="python3", resources=place, timeout=280).execute()
    return folder, notebook


def shown(notebook: Any, part: str) -> Any:
    """What the cell that contains `part` gave as its value."""
    (cell,) = (c for c in notebook.cells if c.cell_type == "code" and part in c.source)
    (text,) = (o.data["text/plain"] for o in cell.outputs if o.output_type == "execute_result")
    return text


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    assert NOTEBOOK.stat().st_size < 20_000


def test_it_learns_the_tastes(executed: tuple[Path, Any]) -> None:
    _, notebook = executed
    assert "'state': 'finished'" in shown(notebook, 'pal_ds.train(recipe, "runs/mine")\nrun.status')
    figures = ast.literal_eval(shown(notebook, "pal_ds.evaluate(run)"))
    assert figures["pairs"] >= 6 and figures["accuracy"] > 0.75


def test_a_mistake_is_told_and_the_notebook_goes_on(executed: tuple[Path, Any]) -> None:
    _, notebook = executed
    (cell,) = (c for c in notebook.cells if "except pal_ds.UserError" in c.source)
    said = "".join(o.text for o in cell.outputs if o.get("name") == "stdout")
    assert "optim.learning_rate: 0.01 -> 1.0" in said


def test_the_new_users_reward_is_theirs(executed: tuple[Path, Any]) -> None:
    folder, notebook = executed
    gil = ast.literal_eval(shown(notebook, "pal_ds.adapt(run"))
    assert max(gil, key=gil.get) == "example"
    for picture in ("simplex.png", "simplex_with_gil.png"):
        assert (folder / picture).stat().st_size > 5_000
    assert (folder / "gil_reward" / "model.safetensors").is_file()
