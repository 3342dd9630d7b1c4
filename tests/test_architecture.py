"""The countable rules of the house: who may import what, sizes, docstrings, no head named outside heads/."""

import ast
from pathlib import Path

import pytest

from pal_ds.heads import HEADS
from tests.spawn import ROOT

PACKAGE = ROOT / "pal_ds"
MODULES = sorted(
    path
    for path in [
        *PACKAGE.rglob("*.py"),
        *(ROOT / "tools").rglob("*.py"),
        *(ROOT / "slurm").rglob("*.py"),
    ]
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return names


def inside(path: Path, folder: str) -> bool:
    return path.is_relative_to(PACKAGE / folder)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sizes_and_docstrings(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= MAX_FILE_LINES, f"{path} is longer than {MAX_FILE_LINES} lines"
    assert ast.get_docstring(tree(path)), f"{path} does not say what it is for"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_engine_imports_deepspeed(path: Path) -> None:
    if not inside(path, "engine"):
        assert not any(name.split(".")[0] == "deepspeed" for name in imported(path))


def test_heads_and_exported_files_need_torch_alone() -> None:
    """They travel in exported folders: no pal_ds beyond siblings, no jaxtyping but through heads/shapes.py."""
    for path in [*(PACKAGE / "heads").glob("*.py"), *(PACKAGE / "exported").glob("*.py")]:
        if path.name in ("__init__.py", "exported_head.py"):
            continue
        roots = {name.split(".")[0] for name in imported(path)}
        assert "pal_ds" not in roots, path
        if inside(path, "heads") and path.name != "shapes.py":
            assert not roots & {"jaxtyping", "transformers", "numpy"}, path


def test_dependencies_point_one_way() -> None:
    """data -> backbones -> (heads stand alone) -> engine -> loop; nothing imports what comes after it."""
    forbidden = {
        "data": (
            "pal_ds.backbones",
            "pal_ds.engine",
            "pal_ds.train",
            "pal_ds.losses",
            "pal_ds.users",
        ),
        "backbones": ("pal_ds.engine", "pal_ds.train", "pal_ds.losses", "pal_ds.users"),
        "engine": (
            "pal_ds.train",
            "pal_ds.start",
            "pal_ds.evaluate_run",
            "pal_ds.export",
            "pal_ds.cli",
        ),
    }
    for folder, names in forbidden.items():
        for path in (PACKAGE / folder).rglob("*.py"):
            found = [name for name in imported(path) if name.startswith(names)]
            assert not found, f"{path} imports {found}"


def test_no_head_is_named_outside_heads() -> None:
    """The loop, losses, metrics and export never know which head runs."""
    for path in PACKAGE.rglob("*.py"):
        if inside(path, "heads"):
            continue
        names = {node.id for node in ast.walk(tree(path)) if isinstance(node, ast.Name)}
        names |= {node.attr for node in ast.walk(tree(path)) if isinstance(node, ast.Attribute)}
        names |= {
            node.value
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not names & set(HEADS), f"{path} names {names & set(HEADS)}"
